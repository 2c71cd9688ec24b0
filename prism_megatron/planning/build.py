"""A run to plan: a stage's configuration, taken apart into what the arithmetic reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.rlvr import RLVRConfig, check_rlvr
from prism_megatron.config.stages.sft import SFTConfig, check_sft
from prism_megatron.config.validate import check_align
from prism_megatron.forecast.build import Planned, plan_align, plan_rlvr, plan_sft
from prism_megatron.forecast.plays import Case

StageName = Literal["sft", "align", "rlvr"]
StageConfig = SFTConfig | AlignConfig | RLVRConfig
PAPER_SAMPLES = 1_370_000
"""Demonstrations of the paper's fine-tuning; one epoch (arXiv 2604.28123)."""


@dataclass(frozen=True)
class Layout:
    """What may be chosen freely: it changes no number that is learned."""

    parallel: ParallelConfig
    recompute: RecomputeConfig
    offload: tuple[str, ...] = ()
    """roles whose gradients and optimizer state leave the device while another one trains, or answers are drawn"""
    rollout_tp: int = 0
    """GPUs of a colocated server; 0 for the rollouts that the configuration has"""
    rollout_servers: int = 0
    """colocated servers of a host"""

    def as_flags(self) -> str:
        """As it would be typed."""
        one, default = self.parallel, ParallelConfig()
        names = ("tp", "pp", "vpp", "cp", "ep", "etp", "first_stage_layers", "last_stage_layers")
        flags = [
            f"--{name.replace('_', '-')} {getattr(one, name)}"
            for name in names
            if getattr(one, name) != getattr(default, name)
        ]
        flags += [f"--sp {one.sp}"] if one.sp != default.sp else []
        flags += [self.recompute.as_flags()] if self.recompute.recompute != "none" else []
        flags += ["--recompute-vision"] if self.recompute.recompute_vision else []
        flags += [f"--{role}.offload" for role in self.offload]
        if self.rollout_tp:
            flags += ["--rollout sglang --rollout-colocated"]
            flags += [f"--rollout-tp {self.rollout_tp} --rollout-servers {self.rollout_servers}"]
        return " ".join(flags) or "all data parallel"


@dataclass(frozen=True)
class Run:
    """A stage, its configuration, and the models' sizes. Example: ``Run("sft", SFTConfig(), preset("4B"), 8)``."""

    stage: StageName
    config: StageConfig
    policy: Qwen3VLShape
    world_size: int
    judge: Qwen3VLShape | None = None
    """the dense shape that a discriminator is made of, where it is not the policy's"""

    @property
    def layout(self) -> Layout:
        rollout = self.rollout
        roles = {"policy": self.config.policy}
        if isinstance(self.config, AlignConfig):
            roles["discriminator"] = self.config.discriminator_optimizer
        offload = tuple(role for role, optimizer in roles.items() if optimizer.offload)
        own = Layout(self.config.parallel, self.config.recompute, offload)
        if rollout is None or not rollout.rollout_colocated:
            return own
        return replace(own, rollout_tp=rollout.rollout_tp, rollout_servers=rollout.rollout_servers)

    @property
    def rollout(self) -> RolloutConfig | None:
        """Who samples; None for fine-tuning."""
        return None if isinstance(self.config, SFTConfig) else self.config.rollout

    @property
    def steps(self) -> int:
        """Of the configuration; of fine-tuning without --steps those of the paper's samples, two to a row."""
        if isinstance(self.config, SFTConfig) and self.config.steps is None:
            return PAPER_SAMPLES // 2 // self.config.data.rows_per_step
        assert self.config.steps is not None
        return self.config.steps

    def laid_out(self, layout: Layout) -> Run:
        """The same run otherwise laid out."""
        changed: dict[str, Any] = {"parallel": layout.parallel, "recompute": layout.recompute}
        changed["policy"] = replace(self.config.policy, offload="policy" in layout.offload)
        if isinstance(self.config, AlignConfig):
            changed["discriminator_optimizer"] = replace(
                self.config.discriminator_optimizer, offload="discriminator" in layout.offload
            )
        if layout.rollout_tp and self.rollout is not None:
            changed["rollout"] = replace(
                self.rollout, rollout="sglang", rollout_colocated=True, rollout_tp=layout.rollout_tp,
                rollout_servers=layout.rollout_servers, rollout_embedded_ranks=None,
            )  # fmt: skip
        return replace(self, config=replace(self.config, **changed))

    def check(self) -> None:
        """Raise ConfigError for what the stage itself would refuse before it starts ranks."""
        config = self.config
        if isinstance(config, SFTConfig):
            check_sft(replace(config, steps=config.steps or 1), self.policy, world_size=self.world_size)
        elif isinstance(config, RLVRConfig):
            check_rlvr(config, self.policy, world_size=self.world_size)
        else:
            check_align(config, self.policy, world_size=self.world_size, discriminator=self.judge)

    def planned(self) -> Planned:
        """Its roles as cases of rank 0, on the longest rows that they may meet."""
        config = self.config
        if isinstance(config, SFTConfig):
            return plan_sft(config, self.policy, world_size=self.world_size)
        if isinstance(config, RLVRConfig):
            return plan_rlvr(config, self.policy, world_size=self.world_size)
        return plan_align(config, self.policy, self.judge, world_size=self.world_size)

    def batch(self) -> Batch:
        """One step's sequences, over all ranks."""
        config, case = self.config, self.planned().policy
        if isinstance(config, SFTConfig):
            rows, work = config.data.rows_per_step, case.work
            prompt = config.data.max_tokens - work.answer_tokens
            return Batch(rows, 1, prompt, work.answer_tokens, work.image_grid, updates=1, measures=False)
        return Batch(
            config.rollout.prompts_per_step,
            config.rollout.rollouts_per_prompt,
            config.data.max_prompt_tokens,
            config.data.max_response_tokens,
            case.work.image_grid,
            updates=config.objective.epochs if isinstance(config, RLVRConfig) else 1,
            measures=_measures(config),
        )


@dataclass(frozen=True)
class Batch:
    """What a step goes through: prompts with an image each, and answers as long as they may be."""

    prompts: int
    answers: int
    """to each prompt"""
    prompt_tokens: int
    answer_tokens: int
    image_grid: tuple[int, int, int] | None
    updates: int
    """passes forward and backward over every answer"""
    measures: bool
    """whether a forward pass finds log-probs before the update"""

    @property
    def sequences(self) -> int:
        return self.prompts * self.answers

    @property
    def tokens(self) -> int:
        """Prompts once, and all answers."""
        return self.prompts * self.prompt_tokens + self.sequences * self.answer_tokens


def _measures(config: AlignConfig | RLVRConfig) -> bool:
    if isinstance(config, RLVRConfig):
        return config.objective.mini_batches * config.objective.epochs > 1 or config.objective.kl != "none"
    return config.correction.correction != "none"


CONFIGS: Mapping[StageName, Callable[[], StageConfig]] = {"sft": SFTConfig, "align": AlignConfig, "rlvr": RLVRConfig}
"""The paper's settings of each stage, which are the fields' defaults."""


def case_on(case: Case, rank: int) -> Case:
    """The same role on another rank."""
    return replace(case, rank=rank)
