"""What a rollout is rewarded for, and what a check of it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.fields import AT_LEAST_ONE, POSITIVE, OnResume, Range

RewardPreset = Literal["prism", "sum"]


@dataclass(frozen=True)
class RewardsConfig:
    """Rewards of answers that can be checked (docs/rewards.md)."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    reward_preset: RewardPreset = "prism"
    """prism: 0.8 for a right answer and 0.2 for the format, 0 without the format (PRISM's code); sum: 1 for each (its
    paper)"""
    reward: str | None = None
    """package.module:function whose number takes the place of the answer's rightness; docs/rewards.md has an example"""
    reward_seconds: Annotated[float, POSITIVE] = 10.0
    """that one call of --reward may take by the clock; one that takes longer is ended and gives 0"""
    check_seconds: Annotated[float, POSITIVE] = 1.0
    """of CPU time that one check of an answer may take; one that takes more is ended, and the answer is wrong"""
    reward_memory_gb: Annotated[float, Range(at_least=0.5)] = 1.0
    """address space of a process that checks answers or calls --reward"""
    reward_workers: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 2
    """processes that check answers, and as many that call --reward; they start when they are needed"""
