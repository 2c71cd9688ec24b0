"""Builds the steps to play for a run from its configuration, which is taken apart here: on the longest rows there are.

Prompts are as long as --max-prompt-tokens with one image that fills them (64 tokens of text aside, and no more than
--max-pixels), answers as long as --max-response-tokens; demonstrations as long as --max-tokens, half of it an image.
Micro-batches are as many as a pipeline holds at once; more of them would need no more memory. A KL term, later
mini-batches and further epochs are left out: they hold a few numbers a token more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.forecast import ForecastConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.config.stages.sft import SFTConfig
from prism_megatron.config.validate import towers_layout
from prism_megatron.forecast.plays import Case
from prism_megatron.forecast.workload import Workload
from prism_megatron.training.roles import resolve_dtype

_TEXT = 64
"""Tokens of text beside an image."""


@dataclass(frozen=True)
class Planned:
    """A run's roles as cases of rank 0, and what else lies on the device while they train."""

    roles: Mapping[str, Case]
    settings: ForecastConfig
    has_reference: bool = False
    """whether a frozen copy of the policy is held, cut as the policy is"""
    samples_here: bool = False
    """whether the rank holds a whole policy that samples, on no more than its own device"""

    def recomputing(self, recompute: RecomputeConfig) -> Planned:
        """The same run with another setting, which both roles have."""
        return replace(self, roles={name: replace(case, recompute=recompute) for name, case in self.roles.items()})

    @property
    def policy(self) -> Case:
        return self.roles["policy"]

    def ranks(self) -> tuple[int, ...]:
        """The first and the last, which stand for their pipeline stages; where there is one stage, the first."""
        return (0, self.policy.world_size - 1) if self.policy.parallel.pp > 1 else (0,)


def plan_sft(config: SFTConfig, shape: Qwen3VLShape, *, world_size: int) -> Planned:
    """Fine-tuning of a policy of this shape."""
    data, parallel = config.data, config.parallel
    a_rank = data.rows_per_step // _data_parallel(parallel, world_size) // data.rows_per_microbatch
    grid = _image(shape, data.max_tokens // 2, data.max_pixels)
    text = max(1, min(_TEXT, data.max_tokens // 4))
    work = Workload(
        prompts=1,
        rollouts=data.rows_per_microbatch * max(1, min(parallel.pp, a_rank)),
        text_tokens=text,
        image_grid=grid,
        answer_tokens=max(3, data.max_tokens - text - _tokens(shape, grid)),
        tokens_per_microbatch=data.max_tokens * data.rows_per_microbatch,
    )
    policy = Case(
        "sft", shape, parallel, 0, world_size, work, config.recompute, config.policy,
        router_losses=config.experts.losses, freeze=config.freeze, fp32_head=config.precision.fp32_head,
        dtype=resolve_dtype(config.model.dtype, shape),
    )  # fmt: skip
    return Planned({"policy": policy}, config.forecast)


def plan_rlvr(config: RLVRConfig, shape: Qwen3VLShape, *, world_size: int) -> Planned:
    """Reinforcement of a policy of this shape."""
    objective = replace(config.objective, mini_batches=1, epochs=1, kl="none", kl_coefficient=0.0)
    policy = _player(config, shape, world_size=world_size, objective=objective)
    return Planned(
        {"policy": policy},
        config.forecast,
        has_reference=config.objective.kl != "none",
        samples_here=config.rollout.rollout == "embedded",
    )


def plan_align(config: AlignConfig, shape: Qwen3VLShape, judge: Qwen3VLShape | None, *, world_size: int) -> Planned:
    """Both players of an alignment; ``judge`` is the shape that a discriminator is made of, if not the policy's."""
    flags = config.discriminator
    objective = PolicyObjective(correction=config.correction)
    policy = _player(config, shape, world_size=world_size, objective=objective)
    variant = Variant.of(flags)
    work = policy.work
    if variant.modality == "text":
        work = replace(work, text_tokens=config.data.max_prompt_tokens, image_grid=None)
    frozen = flags.freeze_vision or variant.modality == "text"
    discriminator = replace(
        policy, play="judge", shape=judge or shape, work=work, optimizer=config.discriminator_optimizer,
        parallel=towers_layout(config, shape) or config.parallel,
        towers=variant.towers, load_balance=flags.load_balance or 0.0, freeze=ALL_VISION if frozen else (),
        fp32_head=False,
    )  # fmt: skip
    return Planned(
        {"policy": policy, "discriminator": discriminator},
        config.forecast,
        samples_here=config.rollout.rollout == "embedded",
    )


def _player(
    config: AlignConfig | RLVRConfig,
    shape: Qwen3VLShape,
    *,
    world_size: int,
    objective: PolicyObjective,
) -> Case:
    return Case(
        "align",
        shape,
        config.parallel,
        0,
        world_size,
        replace(_answers(config, shape, world_size), share_prompts=True),
        config.recompute,
        config.policy,
        objective,
        freeze=ALL_VISION if config.model.freeze_policy_vision else (),
        fp32_head=config.precision.fp32_head,
        dtype=resolve_dtype(config.model.dtype, shape),
    )


def _answers(config: AlignConfig | RLVRConfig, shape: Qwen3VLShape, world_size: int) -> Workload:
    """As many of the longest answers as fill the micro-batches that a pipeline holds, on every data-parallel rank."""
    data, rollout, parallel = config.data, config.rollout, config.parallel
    replicas, budget = _data_parallel(parallel, world_size), config.tokens_per_microbatch
    grid = _image(shape, max(1, data.max_prompt_tokens - _TEXT), data.max_pixels)
    longest = data.max_prompt_tokens + data.max_response_tokens
    wanted = max(1, budget // longest) * parallel.pp
    rollouts = min(rollout.rollouts_per_prompt, wanted)
    prompts = min(rollout.prompts_per_step // replicas, -(-wanted // rollouts))
    return Workload(
        prompts=replicas * max(1, prompts),
        rollouts=rollouts,
        text_tokens=max(1, data.max_prompt_tokens - _tokens(shape, grid)),
        image_grid=grid,
        answer_tokens=data.max_response_tokens,
        tokens_per_microbatch=budget,
    )


def _image(shape: Qwen3VLShape, tokens: int, max_pixels: int | None) -> tuple[int, int, int]:
    """Patches of the largest image, nearly a square, that takes at most so many tokens and pixels."""
    merge = shape.vision.merge
    if max_pixels is not None:
        tokens = max(1, min(tokens, max_pixels // (shape.vision.patch * merge) ** 2))
    rows = math.isqrt(tokens)
    return (1, rows * merge, tokens // rows * merge)


def _tokens(shape: Qwen3VLShape, grid: tuple[int, int, int]) -> int:
    return math.prod(grid) // shape.vision.merge**2


def _data_parallel(parallel: ParallelConfig, world_size: int) -> int:
    return world_size // parallel.model_parallel_size
