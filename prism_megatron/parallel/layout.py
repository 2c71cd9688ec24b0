"""Rank arithmetic of Megatron's order tp-cp-dp-pp (tp fastest), and which tokens a rank holds. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from prism_megatron.config.engine.parallel import ParallelConfig

T = TypeVar("T")


class Place(NamedTuple):
    """Coordinates of one rank."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int


def data_parallel_size(world_size: int, parallel: ParallelConfig) -> int:
    """Copies of the model in a world. Raises ValueError when the world is not a multiple of one copy."""
    if world_size % parallel.model_parallel_size:
        raise ValueError(
            f"{world_size} ranks are not a multiple of tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp}"
        )
    return world_size // parallel.model_parallel_size


def place_of(rank: int, *, world_size: int, parallel: ParallelConfig) -> Place:
    """Where ``rank`` stands; the same numbers as ``World.tp_rank``, ``cp_rank``, ``dp_rank`` and ``pp_rank``."""
    dp_size = data_parallel_size(world_size, parallel)
    rest, tp_rank = divmod(rank, parallel.tp)
    rest, cp_rank = divmod(rest, parallel.cp)
    pp_rank, dp_rank = divmod(rest, dp_size)
    return Place(tp_rank=tp_rank, cp_rank=cp_rank, dp_rank=dp_rank, pp_rank=pp_rank)


class ExpertGroups(NamedTuple):
    """The ranks of one rank's groups, each in the order of the group."""

    ep: tuple[int, ...]
    """which share the experts of a layer among them"""
    etp: tuple[int, ...]
    """which share each expert"""
    etp_ep: tuple[int, ...]
    """which hold one copy of a layer's experts"""
    etp_ep_pp: tuple[int, ...]
    """which hold one copy of all experts"""
    edp: tuple[int, ...]
    """which hold the same experts"""


def expert_groups(rank: int, *, world_size: int, parallel: ParallelConfig) -> ExpertGroups:
    """The groups of ``rank`` in Megatron's order tp-ep-dp-pp of experts. ValueError where a world does not divide."""
    one_copy = parallel.expert_tp * parallel.ep
    stage, left_over = divmod(world_size, parallel.pp)
    if left_over or stage % one_copy:
        raise ValueError(f"{world_size} ranks are not a multiple of pp {parallel.pp} x etp and ep {one_copy}")
    pp_rank, place = divmod(rank, stage)
    edp_rank, place = divmod(place, one_copy)
    ep_rank, etp_rank = divmod(place, parallel.expert_tp)

    def at(*, etp: int = etp_rank, ep: int = ep_rank, edp: int = edp_rank, pp: int = pp_rank) -> int:
        return etp + parallel.expert_tp * ep + one_copy * edp + stage * pp

    inside = [(etp, ep) for ep in range(parallel.ep) for etp in range(parallel.expert_tp)]
    return ExpertGroups(
        ep=tuple(at(ep=ep) for ep in range(parallel.ep)),
        etp=tuple(at(etp=etp) for etp in range(parallel.expert_tp)),
        etp_ep=tuple(at(etp=etp, ep=ep) for etp, ep in inside),
        etp_ep_pp=tuple(at(etp=etp, ep=ep, pp=pp) for pp in range(parallel.pp) for etp, ep in inside),
        edp=tuple(at(edp=edp) for edp in range(stage // one_copy)),
    )


def zigzag(slots: Sequence[int], *, cp_size: int, cp_rank: int) -> npt.NDArray[np.int64]:
    """Numbers of the tokens that one context-parallel rank holds, in the order it holds them.

    ``slots`` are the padded lengths of the sequences that lie one after the other in a row. Each is cut into
    2 · cp_size chunks, of which a rank takes one from the front and its mirror from the back, so that causal attention
    costs every rank the same. Raises ValueError for a slot that does not divide.
    """
    if cp_size == 1:
        return np.arange(sum(slots), dtype=np.int64)
    held = []
    start = 0
    for slot in slots:
        chunk, left_over = divmod(slot, 2 * cp_size)
        if left_over:
            raise ValueError(f"a sequence of {slot} tokens does not divide into 2 · cp = {2 * cp_size} chunks; pad it")
        chunks = np.arange(start, start + slot, dtype=np.int64).reshape(2 * cp_size, chunk)
        held.append(chunks[[cp_rank, 2 * cp_size - 1 - cp_rank]].reshape(-1))
        start += slot
    return np.concatenate(held)


def share_of(items: Sequence[T], *, index: int, count: int) -> Sequence[T]:
    """The contiguous share ``index`` of ``count``; sizes differ by one at most and shares concatenate to ``items``."""
    size, extra = divmod(len(items), count)
    start = index * size + min(index, extra)
    return items[start : start + size + (index < extra)]
