"""The whole configuration of an alignment run. Field defaults are the paper's (500 steps, both players AdamW 1e-6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.forecast import ForecastConfig
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import SAME_LAYOUT, DiscriminatorLayoutConfig, ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.engine.speed import SpeedConfig
from prism_megatron.config.fields import AT_LEAST_ONE, OnResume
from prism_megatron.config.run import RunConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.exam import NO_EXAM, ExamConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.stages.objective import CorrectionConfig
from prism_megatron.config.stages.rewards import RewardsConfig


@dataclass(frozen=True)
class AlignConfig:
    """Align a policy against a discriminator, adversarially and on-policy."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    parallel: tyro.conf.OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)
    recompute: tyro.conf.OmitArgPrefixes[RecomputeConfig] = field(default_factory=RecomputeConfig)
    precision: tyro.conf.OmitArgPrefixes[PrecisionConfig] = field(default_factory=PrecisionConfig)
    speed: tyro.conf.OmitArgPrefixes[SpeedConfig] = field(default_factory=SpeedConfig)
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    rollout: tyro.conf.OmitArgPrefixes[RolloutConfig] = field(default_factory=RolloutConfig)
    discriminator: tyro.conf.OmitArgPrefixes[DiscriminatorConfig] = field(default_factory=DiscriminatorConfig)
    discriminator_layout: tyro.conf.OmitArgPrefixes[DiscriminatorLayoutConfig] = SAME_LAYOUT
    game: tyro.conf.OmitArgPrefixes[GameConfig] = field(default_factory=GameConfig)
    correction: tyro.conf.OmitArgPrefixes[CorrectionConfig] = field(default_factory=CorrectionConfig)
    exam: tyro.conf.OmitArgPrefixes[ExamConfig] = NO_EXAM
    rewards: tyro.conf.OmitArgPrefixes[RewardsConfig] = field(default_factory=RewardsConfig)
    """how answers to held-out prompts are checked; what the policy is rewarded by is the discriminator's score alone"""
    checkpoint: tyro.conf.OmitArgPrefixes[CheckpointConfig] = field(default_factory=CheckpointConfig)
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    forecast: tyro.conf.OmitArgPrefixes[ForecastConfig] = field(default_factory=ForecastConfig)
    policy: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: Annotated[OptimizerConfig, tyro.conf.arg(name="discriminator")] = field(
        default_factory=OptimizerConfig
    )
    prompts: Path | None = None
    """records to play on, of those of --data, or scenes of the mini world, which then come again every epoch: lines of
    JSON with ids, such as selected.jsonl of prism-select-prompts"""
    steps: Annotated[int, AT_LEAST_ONE, OnResume.LONGER] = 500
    """alignment steps; each updates the discriminator once and the policy once, unless told otherwise"""
    seed: int = 42
    """keys sampling, dropout and the order of the data"""
    tokens_per_microbatch: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 16384
    """tokens, padding included, that one forward and backward pass of either player holds at most; an answer that is
    longer by itself, or for the discriminator one with its reference, runs alone"""
