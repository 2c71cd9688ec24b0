"""The newest weights in a folder: what servers go back to, what a restarted one is given, what ``disk`` hands over.

A model folder like any other, but written as the weights pass by, a file for each piece, and never flushed: it is of
no use to another run. Several processes may write it together, each its part; ``join_parts`` then makes it whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from prism_megatron.conversion.hf.reader import INDEX
from prism_megatron.conversion.hf.stored_tensor import bytes_of, safetensors_header, safetensors_in
from prism_megatron.conversion.hf.writer import read_companions
from prism_megatron.errors import WeightSyncError


def spool_folder(root: Path, number: int) -> Path:
    """Where the weights of an engine's update ``number`` go."""
    return root / f"weights-{number}"


def remove_leftovers(root: Path) -> None:
    """Remove the spools that a run left in ``root`` when it was killed; nobody may use them any more."""
    for folder in root.glob("weights-*"):
        shutil.rmtree(folder)


def remove_older(folder: Path) -> None:
    """Remove the spools beside ``folder`` that were begun before it."""
    for other in folder.parent.glob("weights-*"):
        if int(other.name.removeprefix("weights-")) < int(folder.name.removeprefix("weights-")):
            shutil.rmtree(other)


def join_parts(folder: Path, parts: Sequence[int], *, like: Path) -> bool:
    """Make a model folder of ``parts`` once all of them are finished; False before that.

    The index comes last: a folder that has one is whole. Raises WeightSyncError as ``Spool``.
    """
    lists = [folder / f"part-{part:05d}.json" for part in parts]
    if not all(path.exists() for path in lists):
        return False
    whole = Spool(folder, like=like, part=parts[0])
    for path in lists:
        whole.file_of |= json.loads(path.read_text(encoding="utf-8"))
    whole.write_index()
    return True


class Spool:
    """A folder that is being filled; ``finish`` makes a model folder of it, or ends this process's part of one."""

    def __init__(self, folder: Path, *, like: Path, part: int | None = None) -> None:
        """``like`` is the model folder whose config and tokenizer it gets.

        Processes that fill one folder together have each the number of a ``part``, by which their files are told apart.
        Every call raises WeightSyncError where the disk does not take it.
        """
        self.folder = folder
        self.file_of: dict[str, str] = {}
        """the file of each weight, by its name"""
        self._like = like
        self._part = part
        self._prefix = "weights" if part is None else f"weights-{part:05d}"
        self._num_files = 0
        with self._on_disk():
            folder.mkdir(parents=True, exist_ok=part is not None)

    def add(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Write tensors into a file of their own."""
        name = self._new_file()
        head, _ = safetensors_header({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors})
        with self._on_disk(), (self.folder / name).open("wb") as file:
            file.write(head)
            for _, tensor in tensors:
                file.write(bytes_of(tensor.detach().cpu().contiguous()))
        self.file_of |= {key: name for key, _ in tensors}

    def carry_over(self, previous: Path, names: AbstractSet[str]) -> None:
        """Take the weights ``names`` as this part of the folder ``previous`` has them; whole files are linked."""
        for path in sorted(previous.glob(f"{self._prefix}-*.safetensors")):
            held = safetensors_in(path)
            kept = held.keys() & names
            if kept == held.keys():
                name = self._new_file()
                with self._on_disk():
                    _link(path, self.folder / name)
                self.file_of |= dict.fromkeys(kept, name)
            elif kept:
                self.add([(key, held[key].rows(0, held[key].shape[0])) for key in sorted(kept)])

    def finish(self) -> None:
        """Make a model folder of it; of a part, say that it is whole and which file has which weight."""
        if self._part is None:
            self.write_index()
            return
        begun, done = self.folder / f"part-{self._part:05d}.begun", self.folder / f"part-{self._part:05d}.json"
        with self._on_disk():
            begun.write_text(json.dumps(self.file_of), encoding="utf-8")
            begun.rename(done)  # whoever sees it sees all of it

    def write_index(self) -> None:
        """Write the companion files and the index."""
        index = {"metadata": {}, "weight_map": self.file_of}
        with self._on_disk():
            for name, content in read_companions(self._like).items():
                (self.folder / name).write_bytes(content)
            (self.folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _new_file(self) -> str:
        self._num_files += 1
        return f"{self._prefix}-{self._num_files:05d}.safetensors"

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WeightSyncError(f"the weights cannot be written to {self.folder}: {error}") from error


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, other)
