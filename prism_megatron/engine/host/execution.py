"""How a model's layers run; what it computes is the same in every case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig, check_settled
from prism_megatron.config.experiments.speed import SpeedConfig
from prism_megatron.engine.host.capabilities import Capabilities, choose, installed


@dataclass(frozen=True)
class Execution:
    """What the backward pass recomputes, in which precision matrices are multiplied, and whose modules layers are.

    Example: ``Execution(RecomputeConfig("full"), PrecisionConfig(fp8="hybrid"), layers="te")``.
    """

    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    layers: Literal["te", "torch"] = "torch"
    """``Capabilities.layers``: Transformer Engine's, or megatron-core's own over torch"""
    fuse_weight_gradients: bool = False
    """``SpeedConfig.fuse_weight_gradients``"""


PLAIN = Execution()
"""Nothing recomputed, no FP8, layers of torch."""


def execution_here(
    recompute: RecomputeConfig,
    precision: PrecisionConfig,
    speed: SpeedConfig | None = None,
    *,
    say: Callable[[str], None],
) -> tuple[Execution, Capabilities]:
    """How layers run on this machine, with what is installed here; ``say`` is told what does what.

    Raises ConfigError for what is asked of Transformer Engine, or of the device, that it cannot do, and for
    --recompute auto, which is settled before ranks start.
    """
    check_settled(recompute)
    capabilities = choose(installed(), precision, speed)
    for line in capabilities.lines():
        say(line)
    fuse = speed is not None and speed.fuse_weight_gradients
    return Execution(recompute, precision, capabilities.layers, fuse), capabilities
