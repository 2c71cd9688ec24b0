"""Reads the weights of a Hugging Face folder: safetensors only, one file or shards with an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prism_megatron.conversion.hf.files import check_header, describe, member, read_object
from prism_megatron.conversion.hf.stored_tensor import SAFETENSORS_DTYPES, StoredTensor, safetensors_in
from prism_megatron.errors import ConversionError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HFFolder:
    """Named tensors of a model folder, read one at a time from memory-mapped files (see ``TensorSource``).

    Opening checks the whole folder against its index, so that a damaged one is refused before any weight is used.
    Pickled weights are never opened: unpickling a file runs whatever code it holds.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ConversionError for a folder without safetensors, or whose index and files do not agree."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConversionError(f"{self.folder} is not a folder; give a Hugging Face model folder")
        listed = self._listed()
        self._files: dict[str, Any] = {file: self._open(file) for file in sorted(set(listed.values()))}
        held: dict[str, str] = {}
        for file, handle in self._files.items():
            for name in handle.keys():  # noqa: SIM118 - a handle of safetensors is no mapping
                if name in held:
                    raise ConversionError(f"{self.folder}: tensor {name!r} is in both {held[name]} and {file}")
                held[name] = file
        for name, file in listed.items():
            if held.get(name) != file:
                raise ConversionError(f"{self.folder / INDEX} puts {name!r} into {file}, which does not hold it")
        if strangers := sorted(held.keys() - listed.keys()):
            raise ConversionError(
                f"{self.folder}: {held[strangers[0]]} holds {strangers[0]!r}, which {INDEX} does not list"
            )
        self._file_of = held
        self._stored: dict[str, dict[str, StoredTensor]] = {}

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, from the file headers."""
        return {name: tuple(self._handle(name).get_slice(name).get_shape()) for name in self._file_of}

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every tensor, from the file headers. Raises ConversionError for one that no weight has."""
        return {name: self._dtype(name) for name in self._file_of}

    def get(self, name: str) -> Tensor:
        """One full tensor, on the CPU. Raises ConversionError for a name the folder does not hold."""
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor

    def get_slice(self, name: str, index: int) -> Tensor:
        """One entry of dimension 0, read without the rest of the tensor. Raises ConversionError as ``get``."""
        return self.get_rows(name, index, index + 1)[0]

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of dimension 0, in memory of their own."""
        self._handle(name)
        file = self._file_of[name]
        if file not in self._stored:
            self._stored[file] = safetensors_in(self.folder / file)
        return self._stored[file][name].rows(start, stop)

    def _dtype(self, name: str) -> torch.dtype:
        spelled = self._handle(name).get_slice(name).get_dtype()
        if spelled not in SAFETENSORS_DTYPES:
            raise ConversionError(f"{self.folder}: tensor {name!r} is of type {spelled}, which is not read")
        return SAFETENSORS_DTYPES[spelled]

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise ConversionError(f"{self.folder} holds no tensor {name!r}")
        return self._files[self._file_of[name]]

    def _listed(self) -> dict[str, str]:
        """Tensor name -> file name, by the index or by the one file there is."""
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.exists() and index.exists():
            raise ConversionError(f"{self.folder} holds both {SINGLE} and {INDEX}; remove the one that is out of date")
        if index.exists():
            return _read_index(self.folder)
        if single.exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickles:
            raise ConversionError(
                f"{self.folder} holds pickled weights ({pickles[0]}), which can run code when opened and are not read; "
                "save the model again with safe_serialization=True"
            )
        raise ConversionError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")

    def _open(self, file: str) -> Any:
        try:
            path = member(self.folder, file)
        except FileNotFoundError as error:
            raise ConversionError(f"{self.folder / INDEX} names {file}, which is missing") from error
        try:
            handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            problem = describe(path) or f"no complete safetensors file ({error}); copy it again"
            raise ConversionError(f"{self.folder / file} is {problem}") from error
        check_header(path)
        return handle


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    listed = read_object(member(folder, INDEX)).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConversionError(f"{path} has no weight_map")
    for name, file in listed.items():
        if (
            not isinstance(file, str)
            or PurePath(file).name != file
            or not file.endswith(".safetensors")
            or {"\\", "\0"} & set(file)
        ):
            raise ConversionError(f"{path} puts {name!r} into {file!r}, which is not a safetensors file of this folder")
    return listed
