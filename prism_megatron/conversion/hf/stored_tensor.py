"""Tensors where they lie in a file: any range of rows is read by itself, straight into memory of its own.

Plain reads instead of memory maps: they are several times faster here (no page faults), and what they read is counted
once, as the tensor they fill.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.errors import ConversionError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the number formats that a model folder may hold."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What flags call the number formats that weights are written in."""

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor ``shape`` of ``dtype`` that begins at byte ``offset`` of the file ``path``."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of dimension 0."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of dimension 0. Raises ConversionError where the file ends before them."""
        raw = torch.empty((stop - start) * self.row_bytes, dtype=torch.uint8)
        read_exactly(self.path, self.offset + start * self.row_bytes, raw)
        return raw.view(self.dtype).view(stop - start, *self.shape[1:])


def read_exactly(path: Path, offset: int, raw: Tensor) -> None:
    """Fill the bytes ``raw`` from ``offset`` on. Raises ConversionError where the file ends before that."""
    target = bytes_of(raw)
    handle = os.open(path, os.O_RDONLY)
    try:
        while target:
            count = os.preadv(handle, [target], offset)
            if not count:
                raise ConversionError(f"{path} ends at byte {offset}, before its tensors do; copy it again")
            target, offset = target[count:], offset + count
    finally:
        os.close(handle)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def safetensors_in(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie, by its header. The file has been opened by safetensors before."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    begin = _LENGTH_BYTES + length
    return {
        name: StoredTensor(
            path, begin + entry["data_offsets"][0], tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]]
        )
        for name, entry in header.items()
    }


def safetensors_header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds ``tensors`` one after another, and where each begins in the file.

    Format: a length of 8 bytes, JSON padded with spaces to a multiple of 8, the tensors without gaps.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name], end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}
