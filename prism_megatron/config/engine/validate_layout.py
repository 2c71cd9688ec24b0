"""Which layouts the sizes of the models and the number of processes allow; each complaint names what would do."""

from __future__ import annotations

import math

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import ExpertSizes, divisors
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.errors import ConfigError, listed


def check_layout(
    parallel: ParallelConfig,
    shape: Qwen3VLShape,
    *,
    experts_per_tower: int,
    discriminator: Qwen3VLShape | None = None,
) -> None:
    """Raise ConfigError for a layout that the models' sizes rule out, before any process starts.

    ``shape`` is the policy's, with experts or dense; ``discriminator`` that of the dense model which the discriminator
    was made of, where it is not the policy's own. ``experts_per_tower`` is that of the discriminator's layers; 0 where
    the run has none.
    """
    shape.check_layout(parallel)
    if discriminator is not None:
        try:
            discriminator.check_layout(parallel)
        except ConfigError as error:
            raise ConfigError(f"--discriminator: {error}") from error
    if parallel.vpp > 1 and parallel.pp == 1:
        raise ConfigError(f"--vpp {parallel.vpp} interleaves pipeline stages and needs --pp of at least 2; use --vpp 1")
    if not experts_per_tower:
        if parallel.ep > 1 and shape.text.experts is None:
            raise ConfigError(f"--ep {parallel.ep} needs a model with experts; use --ep 1")
        if parallel.etp is not None and shape.text.experts is None:
            raise ConfigError(f"--etp {parallel.etp} needs a model with experts; leave it out")
        return
    if experts_per_tower % parallel.ep:
        raise ConfigError(
            f"--ep {parallel.ep} must divide the {experts_per_tower} experts of a tower, so that every rank holds its "
            f"share of both; use {listed(divisors(experts_per_tower))}"
        )
    width = (discriminator or shape).text.ffn
    ExpertSizes(experts_per_tower, per_token=1, width=width).check_layout(parallel)


def check_world(parallel: ParallelConfig, world_size: int) -> int:
    """The data-parallel size of ``world_size`` ranks. Raises ConfigError when the layout does not fit them."""
    size = parallel.model_parallel_size
    if world_size % size:
        near = sorted({max(size, world_size // size * size), (world_size // size + 1) * size})
        raise ConfigError(
            f"{_sizes(parallel)} takes a multiple of {size} processes, not {world_size}; start {listed(near)}"
        )
    stage_size = world_size // parallel.pp
    experts = parallel.ep * parallel.expert_tp
    if stage_size % experts:
        fitting = [ep for ep in divisors(stage_size) if stage_size % (ep * parallel.expert_tp) == 0]
        raise ConfigError(
            f"--ep {parallel.ep} --etp {parallel.expert_tp} must divide the {stage_size} processes of a pipeline stage "
            f"({world_size} processes over --pp {parallel.pp}); "
            + (f"use --ep {listed(fitting)}" if fitting else f"use --etp {listed(divisors(stage_size))}")
        )
    return world_size // size


def smallest_world(parallel: ParallelConfig) -> int:
    """The fewest processes that hold the layout: each pipeline stage is a multiple of tp · cp and of ep · etp ranks.

    Expert parallelism may share the ranks of tensor, context and data parallelism.
    """
    return parallel.pp * math.lcm(parallel.tp * parallel.cp, parallel.ep * parallel.expert_tp)


def _sizes(parallel: ParallelConfig) -> str:
    context = f" --cp {parallel.cp}" if parallel.cp > 1 else ""
    return f"--tp {parallel.tp}{context} --pp {parallel.pp}"
