"""What ``make effect`` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EffectConfig:
    """Alignment against its controls on held-out scenes of the mini world."""

    output: Path
    """folder for effect.json and effect.md"""
    seeds: int = 3
    """independent runs of every arm"""
    steps: int = 30
    """alignment steps of a run"""
    scenes: int = 256
    """held-out scenes, the same for every arm and seed"""
    data_parallel: int = 2
    """processes to start"""
