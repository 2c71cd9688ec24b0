"""What ``make effect`` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prism_megatron.config.fields import AT_LEAST_ONE


@dataclass(frozen=True)
class EffectConfig:
    """Alignment against its controls on held-out scenes of the mini world."""

    output: Path
    """folder for effect.json and effect.md"""
    seeds: Annotated[int, AT_LEAST_ONE] = 3
    """independent runs of every arm"""
    steps: Annotated[int, AT_LEAST_ONE] = 30
    """alignment steps of a run"""
    scenes: Annotated[int, AT_LEAST_ONE] = 256
    """held-out scenes, the same for every arm and seed"""
    data_parallel: Annotated[int, AT_LEAST_ONE] = 2
    """processes to start"""
