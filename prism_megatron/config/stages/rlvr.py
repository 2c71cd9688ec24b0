"""The whole configuration of reinforcement learning from verifiable rewards.

Field defaults are those of PRISM's scripts where its three algorithms agree; the rest is set by ``--algo``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, cast

import tyro

from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.forecast import ForecastConfig, check_forecast
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig, check_precision
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.engine.speed import SpeedConfig, check_speed, check_speed_of_experts
from prism_megatron.config.engine.validate_layout import check_layout, check_world
from prism_megatron.config.fields import AT_LEAST_ONE, POSITIVE, ZERO_IS_OFF, OnResume, check_fields
from prism_megatron.config.run import RunConfig
from prism_megatron.config.stages.algorithms import AdvantageForm, AlgorithmName, algorithm
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.dynamic_sampling import DynamicSamplingConfig, check_dynamic_sampling
from prism_megatron.config.stages.exam import ExamConfig
from prism_megatron.config.stages.objective import PolicyObjective, check_objective
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.config.validate import (
    check_data,
    check_format_sft,
    check_prompts,
    check_recompute,
    check_rollout,
    check_timeouts,
)
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class RLVRConfig:
    """Reinforce answers that can be checked."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    parallel: tyro.conf.OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)
    recompute: tyro.conf.OmitArgPrefixes[RecomputeConfig] = field(default_factory=RecomputeConfig)
    precision: tyro.conf.OmitArgPrefixes[PrecisionConfig] = field(default_factory=PrecisionConfig)
    speed: tyro.conf.OmitArgPrefixes[SpeedConfig] = field(default_factory=SpeedConfig)
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=lambda: DataConfig(max_response_tokens=8192))
    rollout: tyro.conf.OmitArgPrefixes[RolloutConfig] = field(
        default_factory=lambda: RolloutConfig(prompts_per_step=32, rollouts_per_prompt=16)
    )
    dynamic: tyro.conf.OmitArgPrefixes[DynamicSamplingConfig] = field(default_factory=DynamicSamplingConfig)
    rewards: tyro.conf.OmitArgPrefixes[RewardsConfig] = field(default_factory=RewardsConfig)
    objective: tyro.conf.OmitArgPrefixes[PolicyObjective] = field(default_factory=PolicyObjective)
    exam: tyro.conf.OmitArgPrefixes[ExamConfig] = field(default_factory=ExamConfig)
    checkpoint: tyro.conf.OmitArgPrefixes[CheckpointConfig] = field(default_factory=CheckpointConfig)
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    forecast: tyro.conf.OmitArgPrefixes[ForecastConfig] = field(default_factory=ForecastConfig)
    policy: OptimizerConfig = field(default_factory=OptimizerConfig)
    prompts: Path | None = None
    """records to train on, of those of --data, or scenes of the mini world, which then come again every epoch:
    selected.jsonl of prism-select-prompts, or lines of JSON with ids"""
    algo: AlgorithmName = "grpo"
    """whose objective, advantages, penalties and rates are the defaults of the flags for them (docs/algorithms.md)"""
    advantage: AdvantageForm = "group"
    """group: reward less the group's mean over its standard deviation; group-mean: less its mean only; gdpo: every
    reward by itself, then whitened over the step"""
    overlong_buffer: Annotated[int, ZERO_IS_OFF] = 0
    """tokens before --max-response-tokens over which an answer's reward falls by --overlong-factor (DAPO)"""
    overlong_factor: Annotated[float, POSITIVE] = 1.0
    """what an answer of --max-response-tokens loses"""
    steps: Annotated[int, AT_LEAST_ONE, OnResume.LONGER] = 1500
    """steps; each draws rollouts and updates the policy --mini-batches times --epochs times"""
    seed: int = 42
    """keys sampling and the order of the data"""
    tokens_per_microbatch: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 16384
    """tokens, padding included, that one forward and backward pass holds at most; an answer that is longer by itself
    runs alone"""

    def of(self, name: str) -> RLVRConfig:
        """This configuration with what an algorithm states in place of its own. Raises ConfigError for no such one."""
        stated = algorithm(name)
        return replace(
            self,
            algo=cast(AlgorithmName, name),
            objective=stated.objective,
            advantage=stated.advantage,
            overlong_buffer=0 if stated.overlong is None else stated.overlong.buffer,
            overlong_factor=1.0 if stated.overlong is None else stated.overlong.factor,
            dynamic=replace(self.dynamic, dynamic_sampling=stated.dynamic_sampling),
            policy=stated.optimizer(self.policy),
        )


def check_rlvr_values(config: RLVRConfig) -> None:
    """Raise ConfigError for a value that no model and no world could use."""
    check_fields(config)
    check_forecast(config.forecast, config.recompute)
    check_data(config.data)
    check_speed(config.speed, distributed_optimizer=config.parallel.distributed_optimizer)
    check_objective(config.objective, like=algorithm(config.algo).objective, top_p=config.rollout.top_p)
    check_dynamic_sampling(config.dynamic, config.rollout)
    longest = config.data.max_response_tokens
    if config.overlong_buffer > longest:
        raise ConfigError(
            f"--overlong-buffer {config.overlong_buffer} is more than the {longest} of --max-response-tokens, so that "
            "every answer would lose; give a smaller one, or 0 for none"
        )
    check_prompts(config.prompts)
    if config.advantage != "gdpo" and config.rollout.rollouts_per_prompt == 1:
        raise ConfigError(
            f"--advantage {config.advantage} compares answers to one prompt, and --rollouts-per-prompt is 1; use more"
        )


def check_rlvr(config: RLVRConfig, shape: Qwen3VLShape, *, world_size: int) -> None:
    """All checks of a run on ``world_size`` processes with a policy of this ``shape``. Raises ConfigError."""
    check_rlvr_values(config)
    check_recompute(config.recompute)
    check_rollout(config.rollout)
    check_timeouts(config.rollout, config.parallel)
    check_layout(config.parallel, shape, experts_per_tower=0)
    check_speed_of_experts(config.speed, [config.parallel] if shape.text.num_experts else [])
    if config.parallel.vpp > 1 and config.data.format_sft:
        raise ConfigError("--format-sft has one micro-batch, and --vpp needs several; leave one of them out")
    dtype = shape.dtype if config.model.dtype == "auto" else config.model.dtype
    check_precision(config.precision, config.parallel, shape, dtype=dtype)
    data_parallel = check_world(config.parallel, world_size)
    check_format_sft(config.data, config.rollout, data_parallel)
    prompts, batches = config.rollout.prompts_per_step, config.objective.mini_batches
    if prompts * config.rollout.rollouts_per_prompt < batches:
        raise ConfigError(
            f"{prompts} prompts of --prompts-per-step times {config.rollout.rollouts_per_prompt} rollouts cannot be "
            f"{batches} --mini-batches; use fewer"
        )
