"""What the backward pass computes again instead of keeping it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from prism_megatron.config.fields import OnResume
from prism_megatron.errors import ConfigError

_Module = Literal["core_attn", "mlp"]
_AUTO_MODULES: tuple[_Module, ...] = ("mlp",)
"""What --recompute auto tries as selective where no module is named. A fused kernel of the core attention keeps little
that recomputing it would free; an MLP keeps several times the width of its layer."""


@dataclass(frozen=True)
class RecomputeConfig:
    """Less memory for more arithmetic; gradients are the same."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    recompute: Literal["none", "selective", "full", "auto"] = "none"
    """in the language tower: nothing, the parts of --recompute-modules, or every layer as a whole. auto: the first of
    these three, in this order, by whose forecast a step fits the device beside --device-reserve-gib; the ranks and the
    run's record know only what it came to (prism-sft, prism-align and prism-rlvr)"""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ()
    """what --recompute selective recomputes: core_attn, the core attention, which is also what stands for nothing
    named; mlp, the MLP (or experts) with its norm. --recompute auto tries mlp where nothing is named"""
    recompute_vision: bool = False
    """recompute every block and merger of the vision tower"""

    def recomputes(self, module: Literal["core_attn", "mlp"]) -> bool:
        """Whether a part of a layer is recomputed by itself."""
        return self.recompute == "selective" and module in (self.recompute_modules or ("core_attn",))

    def by_arithmetic(self) -> tuple[RecomputeConfig, ...]:
        """What auto may come to, from least arithmetic to most: each recomputes all that the one before does, and more.

        Modules stand only where they are chosen, so that any of these is a configuration by itself.
        """
        return (
            replace(self, recompute="none", recompute_modules=()),
            replace(self, recompute="selective", recompute_modules=self.recompute_modules or _AUTO_MODULES),
            replace(self, recompute="full", recompute_modules=()),
        )

    def as_flags(self) -> str:
        """As it would be typed, the vision tower aside."""
        modules = " ".join(("", "--recompute-modules", *self.recompute_modules)) if self.recompute_modules else ""
        return f"--recompute {self.recompute}{modules}"


def check_settled(recompute: RecomputeConfig) -> None:
    """Raise ConfigError for --recompute auto where nothing settles it."""
    if recompute.recompute == "auto":
        raise ConfigError(
            "--recompute auto is settled by a forecast, which prism-sft, prism-align and prism-rlvr make before they "
            "start ranks, and here there is none; name --recompute none, selective or full"
        )
