"""Which groups of rollouts a step learns from, and how long it looks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.fields import AT_LEAST_ONE, OnResume
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class DynamicSamplingConfig:
    """DAPO's dynamic sampling (2503.14476, section 3.2): a group whose rewards are all the same teaches nothing."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    dynamic_sampling: bool = False
    """leave out groups whose answers are all right or all wrong, and ask further prompts until a step has
    --prompts-per-step groups of both"""
    prompts_per_batch: Annotated[int | None, AT_LEAST_ONE] = None
    """prompts that are asked at a time with --dynamic-sampling; by default as many as --prompts-per-step"""
    max_batches: Annotated[int, AT_LEAST_ONE] = 10
    """batches of prompts that one step asks at most; it then learns from what was found"""

    def batch_size(self, rollout: RolloutConfig) -> int:
        """Prompts that are asked at a time."""
        return self.prompts_per_batch or rollout.prompts_per_step


def check_dynamic_sampling(config: DynamicSamplingConfig, rollout: RolloutConfig) -> None:
    """Raise ConfigError for flags that nothing would use, and for groups that cannot differ."""
    default = DynamicSamplingConfig()
    if not config.dynamic_sampling:
        for name in ("prompts_per_batch", "max_batches"):
            if getattr(config, name) != getattr(default, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for --dynamic-sampling; add it, or leave this out")
    elif rollout.rollouts_per_prompt < 2:
        raise ConfigError(
            "--dynamic-sampling keeps groups with right and wrong answers, and --rollouts-per-prompt 1 makes groups of "
            "one; ask for more, or leave it out"
        )
