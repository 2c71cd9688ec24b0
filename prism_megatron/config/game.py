"""Rules of the game between policy and discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GameConfig:
    """From scores to advantages and losses, and the switches of control experiments."""

    alpha: float = 0.5
    """weight of perception in the mixed advantage; reasoning has 1 - alpha"""
    score_clip: float = 10.0
    """scores are clipped to plus or minus this before they are normalised"""
    score_regulariser: float = 0.001
    """weight of the mean squared, unclipped score in the discriminator's loss"""
    format_penalty: float = 1.5
    """taken from the advantage of a rollout that breaks the format"""
    credit: Literal["response", "segment"] = "response"
    """response: the mixed advantage on every token; segment: each segment's tokens get their own tower's"""
    freeze_policy: bool = False
    """control: the policy is never updated"""
    freeze_discriminator: bool = False
    """control: the discriminator is never updated"""
    shuffle_scores: bool = False
    """control: scores are permuted among the rollouts of each group"""
