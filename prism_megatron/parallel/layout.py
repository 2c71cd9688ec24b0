"""Rank arithmetic of Megatron's order tp-cp-ep-dp-pp: tp varies fastest, then dp, then pp. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from prism_megatron.config.parallel import ParallelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Coordinates of one rank."""

    tp_rank: int
    dp_rank: int
    pp_rank: int


def data_parallel_size(world_size: int, parallel: ParallelConfig) -> int:
    """Copies of the model in a world. Raises ValueError when the world is not a multiple of one copy."""
    if world_size % parallel.model_parallel_size:
        raise ValueError(f"{world_size} ranks are not a multiple of tp {parallel.tp} x pp {parallel.pp}")
    return world_size // parallel.model_parallel_size


def place_of(rank: int, *, world_size: int, parallel: ParallelConfig) -> Place:
    """Where ``rank`` stands; the same numbers as ``World.tp_rank``, ``dp_rank`` and ``pp_rank``."""
    dp_size = data_parallel_size(world_size, parallel)
    return Place(
        tp_rank=rank % parallel.tp,
        dp_rank=rank // parallel.tp % dp_size,
        pp_rank=rank // (parallel.tp * dp_size),
    )


def share_of(items: Sequence[T], *, index: int, count: int) -> Sequence[T]:
    """The contiguous share ``index`` of ``count``; sizes differ by one at most and shares concatenate to ``items``."""
    size, extra = divmod(len(items), count)
    start = index * size + min(index, extra)
    return items[start : start + size + (index < extra)]
