"""Whole gradients out of Megatron's buffers, where a distributed optimizer leaves each rank its shard only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn


def gather_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Fill every rank's gradient buffers from the shards that the reduce-scatter left on the data-parallel ranks.

    Collective over the data- and context-parallel ranks of each buffer (experts have their own). A buffer that was
    all-reduced is left as it is.
    """
    for chunk in chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The accumulated fp32 gradient; zeros for a frozen parameter, which has none."""
    gradient: Tensor | None = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient


def spread_of(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> float:
    """How far this rank's gradients lie from those of the first rank of ``group``, at most, relative to their norms."""
    spread = 0.0
    for parameter in parameters:
        gradient = gradient_of(parameter)
        first = gradient.clone()
        dist.broadcast(first, group=group, group_src=0)
        difference = float((gradient - first).norm())
        spread = max(spread, difference / (float(first.norm()) or 1.0))
    return spread
