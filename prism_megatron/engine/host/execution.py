"""How a model's layers run; what it computes is the same in every case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig, check_settled
from prism_megatron.config.engine.speed import SpeedConfig
from prism_megatron.engine.host.capabilities import Capabilities, choose, installed
from prism_megatron.engine.host.fast_paths import PLAIN_PATHS, FastPaths, Setting, fast_paths
from prism_megatron.engine.runtime import World


@dataclass(frozen=True)
class Execution:
    """What the backward pass recomputes, in which precision matrices are multiplied, and whose modules layers are.

    Example: ``Execution(RecomputeConfig("full"), PrecisionConfig(fp8="hybrid"), layers="te")``.
    """

    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    layers: Literal["te", "torch"] = "torch"
    """``Capabilities.layers``: Transformer Engine's, or megatron-core's own over torch"""
    fast: FastPaths = PLAIN_PATHS
    """which of Megatron's faster ways are taken"""


PLAIN = Execution()
"""Nothing recomputed, no FP8, layers of torch."""


def execution_here(
    recompute: RecomputeConfig,
    precision: PrecisionConfig,
    speed: SpeedConfig,
    *,
    world: World,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> tuple[Execution, Capabilities]:
    """How layers run on this machine, with what is installed here; ``say`` is told what does what.

    Raises ConfigError for what is asked of Transformer Engine, of the device or of a faster way, that it cannot do, and
    for --recompute auto, which is settled before ranks start.
    """
    check_settled(recompute)
    machine = installed()
    capabilities = choose(machine, precision)
    setting = Setting(
        layers=capabilities.layers,
        parallel=world.parallel,
        ranks=world.gradient_ranks,
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
    )
    fast, rows = fast_paths(machine, speed, setting)
    capabilities = replace(capabilities, choices=(*capabilities.choices, *rows))
    for line in capabilities.lines():
        say(line)
    return Execution(recompute, precision, capabilities.layers, fast), capabilities
