"""Safetensors files laid out from names, shapes and number formats alone, before a byte of a tensor is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from prism_megatron.conversion.hf.reader import INDEX, SINGLE
from prism_megatron.conversion.hf.stored_tensor import safetensors_header


@dataclass(frozen=True)
class Spec:
    """Shape and number format of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of dimension 0."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its first bytes, its length, and the byte at which each tensor begins, in the order of the file."""

    name: str
    head: bytes
    num_bytes: int
    begins: Mapping[str, int]


@dataclass(frozen=True)
class ShardedFolder:
    """The files of a folder, and the text of its index where there are several."""

    shards: tuple[Shard, ...]
    index: str | None

    def write_index(self, folder: Path) -> None:
        """Write the index where there is one."""
        if self.index is not None:
            (folder / INDEX).write_text(self.index, encoding="utf-8")


def lay_out(tensors: Mapping[str, Spec], shard_bytes: int) -> ShardedFolder:
    """Files of at most ``shard_bytes`` (or one larger tensor), filled in the order of ``tensors``."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in tensors.items():
        if groups[-1] and size + spec.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.num_bytes
    if len(groups) == 1:
        return ShardedFolder((_shard(SINGLE, groups[0], tensors),), None)
    shards = tuple(
        _shard(f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors", group, tensors)
        for number, group in enumerate(groups)
    )
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in tensors.values())},
        "weight_map": dict(sorted((name, shard.name) for shard in shards for name in shard.begins)),
    }
    return ShardedFolder(shards, json.dumps(index, indent=2) + "\n")


def _shard(name: str, group: Sequence[str], tensors: Mapping[str, Spec]) -> Shard:
    # The widest formats first, so that every tensor begins at a multiple of its own width.
    ordered = sorted(group, key=lambda tensor: -tensors[tensor].dtype.itemsize)
    head, begins = safetensors_header({t: (tensors[t].dtype, tensors[t].shape) for t in ordered})
    return Shard(name, head, len(head) + sum(tensors[tensor].num_bytes for tensor in ordered), begins)
