"""Rules of the game between policy and discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RELEASED_FORMAT_PENALTY = 1.5


@dataclass(frozen=True)
class GameConfig:
    """From scores to advantages and losses, and the switches of control experiments."""

    advantage: Literal["per_expert", "joint"] = "per_expert"
    """per_expert: normalise each tower's scores in the group, then mix; joint: mix the scores, then normalise"""
    alpha: float = 0.5
    """weight of perception in the mixed advantage or reward; reasoning has 1 - alpha"""
    score_clip: float = 10.0
    """scores are clipped to plus or minus this before they are normalised"""
    score_regulariser: float = 0.001
    """weight of the mean squared, unclipped score in the discriminator's loss"""
    format_penalty: float | None = None
    """taken from the advantage of a rollout that breaks the format; by default 1.5 with per_expert, 0 with joint"""
    all_invalid_group: Literal["zero", "release"] = "zero"
    """a group without a valid rollout gets advantage 0, or as released minus the format penalty on every rollout"""
    credit: Literal["response", "segment"] = "response"
    """response: the mixed advantage on every token; segment: each segment's tokens get their own tower's"""
    freeze_policy: bool = False
    """control: the policy is never updated"""
    freeze_discriminator: bool = False
    """control: the discriminator is never updated"""
    shuffle_scores: bool = False
    """control: scores are permuted among the rollouts of each group"""

    @property
    def penalty(self) -> float:
        """The format penalty in use."""
        if self.format_penalty is not None:
            return self.format_penalty
        return RELEASED_FORMAT_PENALTY if self.advantage == "per_expert" else 0.0
