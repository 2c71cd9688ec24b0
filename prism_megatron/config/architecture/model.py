"""Which policy a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from prism_megatron.config.fields import OnResume

FreezeGroup = Literal["vision", "projector", "router"]
"""The vision tower; the mergers that bring its output to the language tower's width; the routers of experts."""
ALL_VISION: tuple[FreezeGroup, ...] = ("vision", "projector")

MiniWorld = Literal["habits", "drift"]
"""The built-in worlds: in ``habits`` the sloppy teacher's faults show in its text, in ``drift`` only the picture tells
that its counts are wrong (docs/mini_world.md)."""
FAITHFUL_SHARE = 0.25
"""Of the scenes that supervised fine-tuning learns from, those that are written about without a fault."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy's weights and the number format it trains in."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    model: str | None = None
    """a Qwen3-VL, dense or with experts: run folder, checkpoint, model folder or hub id (org/name@revision); without it
    the built-in mini world runs"""
    mini: MiniWorld = "habits"
    """which mini world: whose scenes are used without --data, whose weights without --model, and whose recipe stands in
    for the defaults; bare --mini is the first"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """compute type of the parameters (masters are always fp32); auto takes the folder's own"""
    freeze_policy_vision: bool = False
    """keep the policy's vision tower and its mergers as loaded; the rollout engine gets them once"""
