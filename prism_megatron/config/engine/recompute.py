"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from prism_megatron.config.fields import OnResume


@dataclass(frozen=True)
class RecomputeConfig:
    """Less memory for more arithmetic; gradients are the same."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    recompute: Literal["none", "selective", "full"] = "none"
    """in the language tower: nothing, the parts of --recompute-modules, or every layer as a whole"""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ()
    """what --recompute selective recomputes: core_attn, the core attention, which is also what stands for nothing
    named; mlp, the MLP (or experts) with its norm"""
    recompute_vision: bool = False
    """recompute every block and merger of the vision tower"""

    def recomputes(self, module: Literal["core_attn", "mlp"]) -> bool:
        """Whether a part of a layer is recomputed by itself."""
        return self.recompute == "selective" and module in (self.recompute_modules or ("core_attn",))
