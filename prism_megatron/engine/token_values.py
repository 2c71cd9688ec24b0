"""Values of single tokens, and sums over whole sequences, where ranks hold parts of them.

Shape suffixes: B rows, S tokens (padded), L tokens of this context-parallel rank, K values of a token, Q sequences,
n chosen tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.engine.batch import Batch, away_from_logits
from prism_megatron.engine.runtime import World

ValuesFn = Callable[[Any, Batch], Tensor]
"""Takes what the model's last chunk returns to ``[K, B, L]``."""


def gather_token_values(found: Sequence[Tensor], batches: Sequence[Batch], world: World) -> list[list[Tensor]]:
    """``[K, tokens]`` of every sequence of every micro-batch, on all ranks of the model-parallel group.

    ``found`` are ``[K, B, L]`` of the last stage's ranks, and empty elsewhere. One sum over context-parallel ranks, and
    two broadcasts over stages, of tensors.
    """
    groups, last = world.groups, world.parallel.pp - 1
    num_values = torch.tensor([found[0].shape[0] if found else 0], device=world.device)
    if world.parallel.pp > 1:
        dist.broadcast(num_values, group=groups.pp, group_src=last)
    count = found[0].shape[0] if found else int(num_values)
    sizes = [count * batch.input_ids_B_S.numel() for batch in batches]
    if found:
        whole = [
            torch.stack([away_from_logits(values_B_L, batch, world) for values_B_L in values_K_B_L]).float()
            for values_K_B_L, batch in zip(found, batches, strict=True)
        ]
        flat = torch.cat([values.reshape(-1) for values in whole])
        if world.parallel.cp > 1:
            dist.all_reduce(flat, group=groups.cp)  # each value is another rank's 0
    else:
        flat = torch.empty(sum(sizes), device=world.device)
    if world.parallel.pp > 1:
        dist.broadcast(flat, group=groups.pp, group_src=last)
    return [
        [values_K_B_S[:, row, start : start + length] for (row, start), length in zip(*_places(batch), strict=True)]
        for values_K_B_S, batch in (
            (part.view(count, *batch.input_ids_B_S.shape), batch)
            for part, batch in zip(flat.split(sizes), batches, strict=True)
        )
    ]


def _places(batch: Batch) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
    return batch.places(), batch.lengths


def sum_over_context(world: World) -> Callable[[Tensor], Tensor]:
    """Adds a tensor over the ranks that hold the other tokens of the same sequences, gradients included.

    Every rank's loss is its own tokens' share of the whole one, so that a sum's gradient is the sum of all ranks'.
    """
    if world.parallel.cp == 1:
        return _as_it_is
    return partial(_sum, world.groups.cp)


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _sum(group: dist.ProcessGroup, values: Tensor) -> Tensor:
    summed: Tensor = _SumOverRanks.apply(values, group)  # type: ignore[no-untyped-call]  # torch's Function.apply
    return summed


class _SumOverRanks(torch.autograd.Function):
    """An all-reduce whose backward is one too: both run on every rank whatever its tokens."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        summed = values.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = grad.clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None
