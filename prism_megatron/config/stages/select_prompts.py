"""The configuration of ``prism-select-prompts``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, SHARE, OnResume, check_fields
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.config.validate import check_data, check_rollout, check_timeouts
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class SelectPromptsConfig:
    """Which prompts does a policy answer right now and then? Those are the ones that it can learn from (docs/
    verifiable_rewards.md)."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=lambda: DataConfig(max_response_tokens=8192))
    rollout: tyro.conf.OmitArgPrefixes[RolloutConfig] = field(
        default_factory=lambda: RolloutConfig(prompts_per_step=32, rollouts_per_prompt=16)
    )
    rewards: tyro.conf.OmitArgPrefixes[RewardsConfig] = field(default_factory=RewardsConfig)
    model: str | None = None
    """the policy that answers: run folder, checkpoint, model folder or hub id (org/name@revision); without it, for
    scenes, the mini world's own, as prism-rlvr begins with it"""
    mini: MiniWorld = "habits"
    """which mini world --scenes are of; bare --mini is the first"""
    scenes: Annotated[int, NOT_NEGATIVE] = 0
    """scenes of the mini world to select from, in place of --data; with --mini 256 by default"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """compute type of the policy; auto takes the folder's own"""
    keep_from: Annotated[float, SHARE, OnResume.FREE] = 0.2
    """least share of right answers of a prompt that is kept"""
    keep_to: Annotated[float, SHARE, OnResume.FREE] = 0.8
    """greatest share of right answers of a prompt that is kept"""
    output: Annotated[Path | None, OnResume.COMMAND] = None
    """folder of the result; one that was begun is gone on with. Without it a new one under runs/"""
    ranks: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 1
    """processes to start on this host, which share the prompts; torchrun starts its own"""
    distributed_timeout_minutes: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 30
    """how long ranks wait for one another, as while another one samples, before all give up"""
    seed: int = 42
    """keys sampling, and scenes"""

    @property
    def parallel(self) -> ParallelConfig:
        """Nothing of the policy is split: every rank samples for itself."""
        return ParallelConfig(distributed_timeout_minutes=self.distributed_timeout_minutes)


def check_select_prompts(config: SelectPromptsConfig) -> None:
    """Raise ConfigError for what cannot work, whatever the model."""
    check_fields(config)
    check_data(config.data)
    check_rollout(config.rollout)
    check_timeouts(config.rollout, config.parallel)
    if config.model is None and not config.scenes:
        raise ConfigError("--model is needed: name the policy whose answers count")
    if config.data.data is None and not config.scenes:
        raise ConfigError("--data is needed: name the folder of the records to select from")
    if config.data.data is not None and config.scenes:
        raise ConfigError(f"--scenes {config.scenes} are of the mini world, and --data names records; leave one out")
    if config.data.format_sft:
        raise ConfigError(
            f"--format-sft {config.data.format_sft} trains, and here a policy only answers; leave it out, and name by "
            "--model a policy that has learned the format"
        )
    if config.keep_from > config.keep_to:
        raise ConfigError(
            f"--keep-from {config.keep_from:g} is more than --keep-to {config.keep_to:g}, so that no prompt would be "
            "kept; swap them"
        )


MINI_SELECT = SelectPromptsConfig(
    data=DataConfig(system_prompt=None, max_response_tokens=96),
    rollout=RolloutConfig(prompts_per_step=32, rollouts_per_prompt=16),
    scenes=256,
)


def mini_select(mini: MiniWorld) -> SelectPromptsConfig:
    """A mini world's recipe."""
    return replace(MINI_SELECT, mini=mini)
