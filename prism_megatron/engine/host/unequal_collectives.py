"""Collectives of parts that differ in length, for a backend that refuses them (gloo). Used by the CPU door only.

Experts that are split over ranks gather what each of these ranks was sent for them, which is never equally much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_unequal(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``mappings._gather_along_first_dim`` that pads parts of unequal length to the longest, and cuts them again."""

    @functools.wraps(original)
    def gather(part: Tensor, group: Any, sizes: Sequence[int] | None = None, use_global_buffer: bool = False) -> Tensor:
        if sizes is None or group.size() == 1:
            return original(part, group, sizes, use_global_buffer)
        padded = part.new_zeros((max(sizes), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])

    return gather


def reduce_scatter_unequal(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``mappings._reduce_scatter_along_first_dim`` that sums everything everywhere where lengths are unequal."""

    @functools.wraps(original)
    def scatter(
        whole: Tensor, group: Any, sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return original(whole, group, sizes, use_global_buffer)
        summed = whole.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        rank: int = group.rank()
        parts: Sequence[Tensor] = summed.split(list(sizes))
        return parts[rank].clone()

    return scatter
