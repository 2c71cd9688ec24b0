"""What a policy is asked while it learns, and never learns from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, ZERO_IS_OFF, OnResume
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class ExamConfig:
    """Held-out prompts, answered greedily and by sampling, whose answers are checked (docs/rewards.md)."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    eval_every: Annotated[int, ZERO_IS_OFF, OnResume.FREE] = 50
    """steps between answers to held-out prompts, which are also asked at every --save-every; 0 asks before the first
    step and after the last alone"""
    eval_prompts: Annotated[int, NOT_NEGATIVE] = 128
    """held-out prompts that are asked, or as many as there are; 0 never asks any"""
    eval_rollouts: Annotated[int, AT_LEAST_ONE] = 4
    """samples of each, beside the greedy answer"""


NO_EXAM = ExamConfig(eval_prompts=0)


def check_exam(exam: ExamConfig, rewards: RewardsConfig) -> None:
    """Raise ConfigError for flags of held-out prompts, or of checks of their answers, where none are asked.

    For a stage that asks none by default, and checks no other answers.
    """
    if exam.eval_prompts:
        return
    for section, default in ((exam, NO_EXAM), (rewards, RewardsConfig())):
        for field in fields(section):
            if getattr(section, field.name) != getattr(default, field.name):
                raise ConfigError(
                    f"--{field.name.replace('_', '-')} is about answers to held-out prompts, and none are asked; say "
                    "how many are to be by --eval-prompts, or leave it out"
                )
