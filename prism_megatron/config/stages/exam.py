"""What a policy is asked while it learns, and never learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, ZERO_IS_OFF, OnResume


@dataclass(frozen=True)
class ExamConfig:
    """Held-out prompts, answered greedily and by sampling, and checked as rollouts are."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    eval_every: Annotated[int, ZERO_IS_OFF, OnResume.FREE] = 50
    """steps between answers to held-out prompts, which are also asked at every --save-every; 0 asks before the first
    step and after the last alone"""
    eval_prompts: Annotated[int, NOT_NEGATIVE] = 128
    """held-out prompts that are asked, or as many as there are; 0 never asks any"""
    eval_rollouts: Annotated[int, AT_LEAST_ONE] = 4
    """samples of each, beside the greedy answer"""
