"""Invertible operations between Hugging Face tensors and the tensor-parallel shards of one Megatron parameter.

Each op has ``split`` (full Hugging Face tensors -> list of tp shards), ``merge`` (its exact inverse) and ``pieces``
(where each shard lies in the *global* tensor, which is the one shard of ``split(tensors, 1)``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Box(NamedTuple):
    """A rectangle of a tensor: ``tensor[offset[0] : offset[0] + size[0], …]``."""

    offset: tuple[int, ...]
    size: tuple[int, ...]


class Op(Protocol):
    """An exact, lossless rearrangement; no arithmetic. A value: equal ops are interchangeable, and hash alike.

    What they give may be views of what they are given. ``split`` and ``merge`` raise ValueError for sizes that do not
    divide, and so does ``pieces``.
    """

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]: ...

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]: ...

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        """Of each rank, the boxes of the global tensor that make its shard when they are joined along dimension 0."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Replicated:
    """Whole on every rank. ``merge`` takes rank 0's."""

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor] * tp_size

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        return [[_whole(global_shape)]] * tp_size


@dataclass(frozen=True)
class Column:
    """``rows`` of dimension 0, padded with zeros to a multiple of ``multiple`` and of tp (see ``vocabulary``)."""

    rows: int
    multiple: int = 1

    def padded_rows(self, tp_size: int) -> int:
        """Rows of all shards together."""
        multiple = math.lcm(self.multiple, tp_size)
        return -(-self.rows // multiple) * multiple

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        (tensor,) = tensors
        padding = self.padded_rows(tp_size) - self.rows
        if padding:
            tensor = torch.cat([tensor, tensor.new_zeros((padding, *tensor.shape[1:]))])
        return _shards(tensor, tp_size, dim=0)

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_joined(shards)[: self.rows]]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        return _slabs(global_shape, tp_size, dim=0)


def vocabulary(size: int) -> Column:
    """An embedding or output layer of ``size`` words: the same padded rows at every tp that divides 128.

    What a checkpoint stores then does not depend on the layout it was saved in. Qwen's vocabularies are multiples of
    128 already; for others this is Megatron's usual padding (its ``make_vocab_size_divisible_by`` is 128).
    """
    return Column(size, multiple=128)


@dataclass(frozen=True)
class Row:
    """Dimension 1, the input of a row-parallel linear."""

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        (tensor,) = tensors
        return _shards(tensor, tp_size, dim=1)

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_joined(shards, dim=1)]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        return _slabs(global_shape, tp_size, dim=1)


@dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value weights as Megatron fuses them: per key/value group its query heads, its key, its value."""

    kv_heads: int
    head_dim: int

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        grouped = torch.cat([_split_rows(tensor, self.kv_heads, -1) for tensor in tensors], dim=1)
        return _shards(grouped.flatten(0, 1), tp_size, dim=0)

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        grouped = _split_rows(_joined(shards), self.kv_heads, -1)
        queries = grouped.shape[1] - 2 * self.head_dim
        return [part.flatten(0, 1) for part in grouped.split([queries, self.head_dim, self.head_dim], dim=1)]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        return _slabs(global_shape, tp_size, dim=0)


@dataclass(frozen=True)
class GateUp:
    """Gate and up weights of a gated MLP, one above the other *inside each shard*."""

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        gates, ups = (_shards(tensor, tp_size, dim=0) for tensor in tensors)
        return [torch.cat(pair) for pair in zip(gates, ups, strict=True)]

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[which] for half in halves]) for which in (0, 1)]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        slabs = _slabs(global_shape, 2 * tp_size, dim=0)
        return [[*gate, *up] for gate, up in zip(slabs[:tp_size], slabs[tp_size:], strict=True)]


@dataclass(frozen=True)
class FusedGateUp:
    """One tensor of all gate rows, then all up rows <-> gate above up inside each shard (see ``GateUp``)."""

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        (tensor,) = tensors
        return GateUp().split(tensor.chunk(2), tp_size)

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(GateUp().merge(shards))]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        return GateUp().pieces(global_shape, tp_size)


@dataclass(frozen=True)
class VisionQKV:
    """One tensor of all queries, all keys, all values (weight or bias) <-> query, key, value of each head in turn."""

    heads: int

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        (tensor,) = tensors
        by_head = _split_rows(tensor, 3, self.heads, -1).transpose(0, 1)
        return _shards(by_head.flatten(0, 2), tp_size, dim=0)

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        by_head = _split_rows(_joined(shards), self.heads, 3, -1)
        return [by_head.transpose(0, 1).flatten(0, 2)]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        return _slabs(global_shape, tp_size, dim=0)


@dataclass(frozen=True)
class PatchEmbed:
    """A convolution whose stride is its kernel (channels, frames, height, width), as the linear map it is."""

    kernel: tuple[int, int, int, int]

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        (tensor,) = tensors
        return [tensor.flatten(1)] * tp_size

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0].view(-1, *self.kernel)]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        return [[_whole(global_shape)]] * tp_size


@dataclass(frozen=True)
class Transposed:
    """``inner`` on matrices that are stored the other way round."""

    inner: Op

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]:
        return self.inner.split([tensor.mT.contiguous() for tensor in tensors], tp_size)

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.mT.contiguous() for tensor in self.inner.merge(shards)]

    def pieces(self, global_shape: tuple[int, ...], tp_size: int) -> list[list[Box]]:
        return self.inner.pieces(global_shape, tp_size)


def _split_rows(tensor: Tensor, *sizes: int) -> Tensor:
    """Dimension 0 as several of these sizes."""
    return tensor.reshape(*sizes, *tensor.shape[1:])


def _shards(tensor: Tensor, tp_size: int, *, dim: int) -> list[Tensor]:
    _check_divides(tuple(tensor.shape), tp_size, dim)
    return [shard.contiguous() for shard in tensor.chunk(tp_size, dim)]


def _joined(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The shards side by side; a single one as it is, uncopied."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def _slabs(shape: tuple[int, ...], count: int, *, dim: int) -> list[list[Box]]:
    """``shape`` cut into ``count`` equal boxes along ``dim``, each in a list of its own."""
    _check_divides(shape, count, dim)
    width = shape[dim] // count
    size = (*shape[:dim], width, *shape[dim + 1 :])
    return [[Box(tuple(n * width * (d == dim) for d in range(len(shape))), size)] for n in range(count)]


def _check_divides(shape: tuple[int, ...], count: int, dim: int) -> None:
    if shape[dim] % count:
        raise ValueError(f"dimension {dim} of a {shape} tensor does not divide into {count} shards")
