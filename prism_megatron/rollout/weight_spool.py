"""The newest weights in a folder: what servers go back to, what a restarted one is given, what ``disk`` hands over.

A model folder like any other, but written as the weights pass by, a file for each piece, and never flushed: it is of
no use to another run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from torch import Tensor

from prism_megatron.conversion.hf_reader import INDEX, HFFolder
from prism_megatron.conversion.hf_writer import read_companions
from prism_megatron.conversion.stored_tensor import bytes_of, safetensors_header, safetensors_in
from prism_megatron.errors import WeightSyncError


class Spool:
    """A folder that is being filled; ``finish`` makes a model folder of it."""

    def __init__(self, folder: Path, *, like: Path) -> None:
        """``like`` is the model folder whose config and tokenizer it gets."""
        self.folder = folder
        self._like = like
        self._file_of: dict[str, str] = {}
        self._num_files = 0
        folder.mkdir(parents=True)

    def add(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Write tensors into a file of their own. Raises WeightSyncError where the disk does not take them."""
        name = self._new_file()
        head, _ = safetensors_header({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors})
        try:
            with (self.folder / name).open("wb") as file:
                file.write(head)
                for _, tensor in tensors:
                    file.write(bytes_of(tensor.detach().cpu().contiguous()))
        except OSError as error:
            raise WeightSyncError(f"the weights cannot be written to {self.folder}: {error}") from error
        self._file_of |= {key: name for key, _ in tensors}

    def carry_over(self, previous: Path, names: AbstractSet[str]) -> None:
        """Take the weights ``names`` as the folder ``previous`` has them, without copying whole files of them."""
        for path in sorted(previous.glob("*.safetensors")):
            held = safetensors_in(path)
            kept = held.keys() & names
            if kept == held.keys():
                name = self._new_file()
                os.link(path, self.folder / name)
                self._file_of |= dict.fromkeys(kept, name)
            elif kept:
                source = HFFolder(previous)
                self.add([(key, source.get(key)) for key in sorted(kept)])

    def finish(self) -> None:
        """Write the index and the companion files."""
        for name, content in read_companions(self._like).items():
            (self.folder / name).write_bytes(content)
        index = {"metadata": {}, "weight_map": self._file_of}
        (self.folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)

    def _new_file(self) -> str:
        self._num_files += 1
        return f"weights-{self._num_files:05d}.safetensors"
