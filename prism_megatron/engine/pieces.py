"""What a rank holds of a checkpoint's tensors, as pieces that lie where they are used: nothing is gathered or copied.

A checkpoint names whole tensors, the same in every layout. Megatron says of a parameter which box of such a tensor its
shard is (``sharded_state_dict``), and the distributed optimizer which stretch of the flattened shard its data-parallel
rank keeps. The two together are boxes again: at most five of a matrix, nearly always one. So each rank writes and reads
its own part, while Megatron's ``fully_reshardable`` form gathers masters and moments of all data-parallel ranks on
each of them (its ``fully_sharded_model_space``, which did not, is refused by ``ShardedTensor`` since 0.16).
Names are those of ``fully_reshardable``, so both forms are read alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from prism_megatron.conversion.boxes import boxes_of_range, intersection
from prism_megatron.conversion.ops import Box

BLOCK_BYTES = 64 * 2**20
"""What is copied to host memory, written or read at a time."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The box ``box`` of the checkpoint's tensor ``key``, and ``tensor``, of the box's size, in which this rank has it.

    Example: rows 64 to 128 of ``policy.embedding.word_embeddings.weight``, whose ``shape`` is [128, 64], on
    tensor-parallel rank 1 of 2.
    """

    key: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    may_differ: bool
    """whether another layout pads dimension 0 to another length"""
    is_written: bool
    """whether this rank writes it: of replicas one does"""


@dataclass(frozen=True, eq=False)
class Stretch:
    """Elements of a flattened parameter, or of a state of the same shape, that this rank keeps, from ``start`` on."""

    parameter: Tensor
    prefix: str
    """what stands before the parameter's name: nothing for its weights, or the name of a state"""
    elements: Tensor
    start: int = 0
    is_replicated: bool = True
    """whether all data-parallel ranks keep the same; each has its own stretch otherwise"""


def pieces_of(shards: Mapping[str, Any], stretches: Iterable[Stretch], groups: ProcessGroupCollection) -> list[Piece]:
    """All pieces of ``stretches``, cut into blocks; ``shards`` is Megatron's sharded state of the weights.

    Of replicas that tensor- or pipeline-parallel ranks hold the first is written, as Megatron has it. Those of
    data-parallel ranks are shared out by size: every rank knows all of them and comes to the same answer by itself.
    """
    described = {id(base.data): base for base in nested_values(shards) if is_shard(base)}
    pieces: list[Piece] = []
    replicated: dict[str, list[int]] = {"dp_cp": [], "expt_dp": []}
    for stretch in stretches:
        base = described[id(stretch.parameter)]
        is_first = not any(base.replica_id[:-1])
        found = [block for part in _parts(base) for piece in _cut(stretch, part, is_first) for block in _blocks(piece)]
        if stretch.is_replicated and is_first:
            # Megatron marks what is not reduced over all data-parallel ranks: experts.
            group = "dp_cp" if getattr(stretch.parameter, "allreduce", True) else "expt_dp"
            assert base.replica_id[-1] == getattr(groups, group).rank(), (base.key, base.replica_id, group)
            replicated[group] += range(len(pieces), len(pieces) + len(found))
        pieces += found
    for name, places in replicated.items():
        group = getattr(groups, name)
        owners = share_out([pieces[place].tensor.nbytes for place in places], group.size())
        for place, owner in zip(places, owners, strict=True):
            pieces[place] = replace(pieces[place], is_written=owner == group.rank())
    return pieces


def is_shard(value: Any) -> bool:
    """Whether Megatron describes a tensor by ``value``; it describes objects too, such as Transformer Engine's."""
    return isinstance(value, ShardedTensor | ShardedTensorFactory)


def share_out(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """Whose each of ``sizes`` is, so that ranks get about as much: the largest goes to whoever has least so far."""
    owners = [0] * len(sizes)
    loads = [(0, rank) for rank in range(num_ranks)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        load, rank = heapq.heappop(loads)
        owners[place] = rank
        heapq.heappush(loads, (load + sizes[place], rank))
    return owners


@dataclass(frozen=True, eq=False)
class _Part:
    """``inner`` of a parameter is one shard of a checkpoint's tensor; gate and up of a fused projection are two."""

    inner: Box
    shard: ShardedTensor


def _parts(base: ShardedTensor | ShardedTensorFactory) -> list[_Part]:
    parameter = base.data
    shards = [base] if isinstance(base, ShardedTensor) else list(nested_values(base.build()))
    parts = []
    for shard in shards:
        # A factory cuts along dimensions; one that copied or turned its parameter could not be read in place.
        is_cut = shard.data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        assert is_cut and shard.data.stride() == parameter.stride(), f"{shard.key} is no part of its parameter"
        rest, offset = shard.data.storage_offset() - parameter.storage_offset(), []
        for stride in parameter.stride():
            offset.append(rest // stride)
            rest %= stride
        parts.append(_Part(Box(tuple(offset), tuple(shard.data.shape)), shard))
    return parts


def _cut(stretch: Stretch, part: _Part, is_first: bool) -> Iterator[Piece]:
    """Where ``stretch`` and ``part`` meet."""
    shape, shard, begin = tuple(stretch.parameter.shape), part.shard, 0
    axes = (1,) * shard.prepend_axis_num
    for box in boxes_of_range(shape, stretch.start, stretch.start + stretch.elements.numel()):
        whole = stretch.elements[begin : begin + torch.Size(box.size).numel()].view(box.size)
        begin += whole.numel()
        common = intersection(box, part.inner)
        if common is None:
            continue
        for dim, (place, first) in enumerate(zip(common.offset, box.offset, strict=True)):
            whole = whole.narrow(dim, place - first, common.size[dim])
        inside = (a - b for a, b in zip(common.offset, part.inner.offset, strict=True))
        offsets = zip(shard.global_offset, (*(0 for _ in axes), *inside), strict=True)
        yield Piece(
            key=f"{stretch.prefix}{shard.key}",
            shape=tuple(shard.global_shape),
            box=Box(tuple(a + b for a, b in offsets), (*axes, *common.size)),
            tensor=whole[(None,) * len(axes)] if axes else whole,
            may_differ=shard.allow_shape_mismatch,
            is_written=is_first,
        )


def _blocks(piece: Piece) -> Iterator[Piece]:
    """The piece in blocks of about ``BLOCK_BYTES``, cut along its first dimension that is longer than 1."""
    dim = next((dim for dim, count in enumerate(piece.box.size) if count > 1), None)
    if dim is None or piece.tensor.nbytes <= BLOCK_BYTES:
        yield piece
        return
    length = piece.box.size[dim]
    step = max(1, length * BLOCK_BYTES // piece.tensor.nbytes)
    for begin in range(0, length, step):
        count = min(step, length - begin)
        offset, size = list(piece.box.offset), list(piece.box.size)
        offset[dim] += begin
        size[dim] = count
        yield replace(piece, box=Box(tuple(offset), tuple(size)), tensor=piece.tensor.narrow(dim, begin, count))
