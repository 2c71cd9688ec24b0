"""The newest weights in a folder: what servers go back to, what a restarted one is given, what ``disk`` hands over.

A model folder like any other, but written as the weights pass by, a file for each piece, and never flushed: it is of
no use to another run.
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

from prism_megatron.conversion.hf.reader import INDEX, HFFolder
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


class Spool:
    """A folder that is being filled; ``finish`` makes a model folder of it."""

    def __init__(self, folder: Path, *, like: Path) -> None:
        """``like`` is the model folder whose config and tokenizer it gets.

        Every call raises WeightSyncError where the disk does not take it.
        """
        self.folder = folder
        self._like = like
        self._file_of: dict[str, str] = {}
        self._num_files = 0
        with self._on_disk():
            folder.mkdir(parents=True)

    def add(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Write tensors into a file of their own."""
        name = self._new_file()
        head, _ = safetensors_header({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors})
        with self._on_disk(), (self.folder / name).open("wb") as file:
            file.write(head)
            for _, tensor in tensors:
                file.write(bytes_of(tensor.detach().cpu().contiguous()))
        self._file_of |= {key: name for key, _ in tensors}

    def carry_over(self, previous: Path, names: AbstractSet[str]) -> None:
        """Take the weights ``names`` as the folder ``previous`` has them; whole files of them are linked."""
        for path in sorted(previous.glob("*.safetensors")):
            held = safetensors_in(path)
            kept = held.keys() & names
            if kept == held.keys():
                name = self._new_file()
                with self._on_disk():
                    _link(path, self.folder / name)
                self._file_of |= dict.fromkeys(kept, name)
            elif kept:
                source = HFFolder(previous)
                self.add([(key, source.get(key)) for key in sorted(kept)])

    def finish(self) -> None:
        """Write the index and the companion files."""
        index = {"metadata": {}, "weight_map": self._file_of}
        with self._on_disk():
            for name, content in read_companions(self._like).items():
                (self.folder / name).write_bytes(content)
            (self.folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _new_file(self) -> str:
        self._num_files += 1
        return f"weights-{self._num_files:05d}.safetensors"

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
