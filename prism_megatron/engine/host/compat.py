"""Where megatron-core 0.16.1 and 0.19.2 differ for the engine. Models' differences live beside the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn


def buffer_layout_arguments(
    parameters: Sequence[nn.Parameter], config: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> dict[str, Any]:
    """What DistributedDataParallel wants to be told, beyond the rest, about sharded gradient buffers.

    0.19.2 takes the layout of its buffers from the distributed optimizer, and logs a complaint on every rank where it
    has to work it out by itself; 0.16.1 has no such argument.
    """
    compute = getattr(DistributedOptimizer, "compute_full_param_layout", None)
    if compute is None or not config.use_distributed_optimizer:
        return {}
    layout = compute(
        [parameter for parameter in parameters if parameter.requires_grad],
        _bucket_size(config, groups),
        groups.dp_cp.size(),
        config,
        expert_data_parallel_world_size=groups.expt_dp.size(),
    )
    return {"full_param_layout": layout}


def _bucket_size(config: DistributedDataParallelConfig, groups: ProcessGroupCollection) -> int | None:
    """As DistributedDataParallel cuts buckets; one on later stages, and where nothing overlaps with backward."""
    if not config.overlap_grad_reduce or groups.pp.rank() > 0:
        return None
    asked: int | None = config.bucket_size
    return asked or max(40_000_000, 1_000_000 * groups.dp.size())
