"""Which layouts the sizes of the models and the number of processes allow; each complaint names what would do."""

from __future__ import annotations

import math

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import ExpertSizes, divisors
from prism_megatron.config.engine.parallel import SAME_LAYOUT, DiscriminatorLayoutConfig, ParallelConfig
from prism_megatron.errors import ConfigError, listed


def check_layout(
    parallel: ParallelConfig,
    shape: Qwen3VLShape,
    *,
    experts_per_tower: int,
    discriminator: Qwen3VLShape | None = None,
    discriminator_layout: DiscriminatorLayoutConfig = SAME_LAYOUT,
) -> None:
    """Raise ConfigError for a layout that the models' sizes rule out, before any process starts.

    ``shape`` is the policy's, with experts or dense; ``discriminator`` that of the dense model which the discriminator
    was made of, where it is not the policy's own, and ``discriminator_layout`` how its experts are split.
    ``experts_per_tower`` is that of the discriminator's layers; 0 where the run has none.
    """
    has_experts = shape.text.experts is not None
    shape.check_layout(parallel)
    if discriminator is not None:
        try:
            discriminator.check_layout(parallel)
        except ConfigError as error:
            raise ConfigError(f"--discriminator: {error}") from error
    if parallel.vpp > 1 and parallel.pp == 1:
        raise ConfigError(f"--vpp {parallel.vpp} interleaves pipeline stages and needs --pp of at least 2; use --vpp 1")
    if not experts_per_tower:
        if parallel.ep > 1 and not has_experts:
            raise ConfigError(f"--ep {parallel.ep} needs a model with experts; use --ep 1")
        if parallel.etp is not None and not has_experts:
            raise ConfigError(f"--etp {parallel.etp} needs a model with experts; leave it out")
        if discriminator_layout != SAME_LAYOUT:
            raise ConfigError(
                "--discriminator-ep and --discriminator-etp split the experts of a discriminator, and there are none; "
                "leave them out"
            )
        return
    width = (discriminator or shape).text.ffn
    _check_towers(parallel, discriminator_layout, experts_per_tower, width=width, beside_experts=has_experts)


def _check_towers(
    parallel: ParallelConfig, asked: DiscriminatorLayoutConfig, experts: int, *, width: int, beside_experts: bool
) -> None:
    """A discriminator's towers of so many experts, ``width`` wide, beside a policy that has some of its own or not."""
    layout = asked.of(parallel, experts_per_tower=experts, beside_experts=beside_experts)
    if layout != parallel and not beside_experts:
        raise ConfigError(
            "--discriminator-ep and --discriminator-etp are for a policy with experts of its own, and this one has "
            "none: --ep and --etp are the discriminator's"
        )
    if experts % layout.ep:
        flag = "--ep" if asked.discriminator_ep is None else "--discriminator-ep"
        raise ConfigError(
            f"{flag} {layout.ep} must divide the {experts} experts of a tower, so that every rank holds its "
            f"share of both; use {listed(divisors(experts))}"
        )
    try:
        ExpertSizes(experts, per_token=1, width=width).check_layout(layout)
    except ConfigError as error:
        raise ConfigError(f"the discriminator: {error}") from error


def check_world(parallel: ParallelConfig, world_size: int, *, towers: ParallelConfig | None = None) -> int:
    """The data-parallel size of ``world_size`` ranks. Raises ConfigError when the layout does not fit them.

    ``towers`` is the layout of a discriminator's experts on the same ranks.
    """
    size = parallel.model_parallel_size
    if world_size % size:
        near = sorted({max(size, world_size // size * size), (world_size // size + 1) * size})
        raise ConfigError(
            f"{_sizes(parallel)} takes a multiple of {size} processes, not {world_size}; start {listed(near)}"
        )
    _check_experts(parallel, world_size, flags="--")
    if towers is not None:
        _check_experts(towers, world_size, flags="--discriminator-")
    return world_size // size


def smallest_world(parallel: ParallelConfig, towers: ParallelConfig | None = None) -> int:
    """The fewest processes that hold the layout: each pipeline stage is a multiple of tp · cp and of ep · etp ranks.

    Expert parallelism may share the ranks of tensor, context and data parallelism. ``towers`` is the layout of a
    discriminator's experts on the same ranks.
    """
    experts = [layout.ep * layout.expert_tp for layout in (parallel, towers) if layout is not None]
    return parallel.pp * math.lcm(parallel.tp * parallel.cp, *experts)


def _check_experts(parallel: ParallelConfig, world_size: int, *, flags: str) -> None:
    stage_size = world_size // parallel.pp
    ep, etp = f"{flags}ep", f"{flags}etp"
    if stage_size % (parallel.ep * parallel.expert_tp):
        fitting = [size for size in divisors(stage_size) if stage_size % (size * parallel.expert_tp) == 0]
        raise ConfigError(
            f"{ep} {parallel.ep} {etp} {parallel.expert_tp} must divide the {stage_size} processes of a pipeline stage "
            f"({world_size} processes over --pp {parallel.pp}); "
            + (f"use {ep} {listed(fitting)}" if fitting else f"use {etp} {listed(divisors(stage_size))}")
        )


def _sizes(parallel: ParallelConfig) -> str:
    context = f" --cp {parallel.cp}" if parallel.cp > 1 else ""
    return f"--tp {parallel.tp}{context} --pp {parallel.pp}"
