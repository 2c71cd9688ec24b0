"""What ``make variants`` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VARIANTS: dict[str, tuple[str, ...]] = {
    "segment": (),
    "learned": ("--routing", "learned"),
    "dense": ("--routing", "dense"),
    "text": ("--modality", "text"),
    "joint": ("--advantage", "joint"),
    "segment credit": ("--credit", "segment"),
}
"""Name and the flag of ``tools/run_align.py`` that sets a variant apart from the defaults."""


@dataclass(frozen=True)
class VariantsConfig:
    """The method's variants beside one another on held-out scenes of the mini world."""

    output: Path
    """folder for variants.json, report.html and the warm-started discriminators, which a later run takes as they are"""
    seeds: int = 1
    """independent alignment runs of every variant"""
    steps: int = 30
    """alignment steps of a run"""
    scenes: int = 256
    """held-out scenes, the same for every variant and seed"""
    data_parallel: int = 2
    """processes to start"""
    warm_start_steps: int = 80
    """steps of warm-start for every kind of discriminator"""
