"""Writes the files of a ``torch_dist`` checkpoint, in the form that torch and both versions of megatron-core read.

The bytes depend on the tensors and on torch's version alone.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from prism_megatron.conversion.checkpoints.folder import BACKEND_FILE, INDEX_FILE, OBJECTS_FILE
from prism_megatron.conversion.ops import Box

_PICKLE_PROTOCOL = 4
"""Python's default up to 3.13; stated, so that the bytes do not depend on Python's version."""


@dataclass(frozen=True)
class WrittenChunk:
    """A chunk of the tensor ``key`` and where it lies: ``length`` bytes from ``offset`` of the data file ``file``."""

    key: str
    box: Box
    file: str
    offset: int
    length: int


def write_data_file(path: Path, tensors: Iterable[Tensor], count: Callable[[int], None]) -> list[int]:
    """Write archives one after another; returns their lengths. The file appears whole, flushed, or not at all."""
    part = path.with_name(f"{path.name}.part")
    lengths = []
    with part.open("wb") as file:
        begin = 0
        for tensor in tensors:
            torch.save(tensor, file)
            lengths.append(file.tell() - begin)
            begin = file.tell()
            count(tensor.nbytes)
            del tensor  # given up before the next one is made
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    return lengths


def write_index(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    chunks: Sequence[WrittenChunk],
) -> Metadata:
    """Write and flush what stands beside the data files: ``.metadata``, ``common.pt`` (empty) and ``metadata.json``.

    Returns the index, which is what ``.metadata`` holds.
    """
    boxes: dict[str, list[Box]] = {key: [] for key in tensors}
    storage = {}
    for chunk in chunks:
        place = MetadataIndex(chunk.key, torch.Size(chunk.box.offset), len(boxes[chunk.key]))
        storage[place] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
        boxes[chunk.key].append(chunk.box)
    described = {
        key: TensorStorageMetadata(
            TensorProperties(dtype),
            torch.Size(shape),
            [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in boxes[key]],
        )
        for key, (shape, dtype) in tensors.items()
    }
    index = Metadata(state_dict_metadata=dict(described), storage_data=storage)
    backend: dict[str, str | int] = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    objects = io.BytesIO()
    torch.save({}, objects)
    for name, content in (
        (INDEX_FILE, pickle.dumps(index, protocol=_PICKLE_PROTOCOL)),
        (OBJECTS_FILE, objects.getvalue()),
        (BACKEND_FILE, json.dumps(backend).encode()),
    ):
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return index
