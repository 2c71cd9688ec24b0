"""What ``make variants`` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prism_megatron.config.cli import parse_over
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.fields import AT_LEAST_ONE
from prism_megatron.config.stages.align import AlignConfig

VARIANTS: dict[str, tuple[str, ...]] = {
    "segment": (),
    "learned": ("--routing", "learned"),
    "dense": ("--routing", "dense"),
    "text": ("--modality", "text"),
    "joint": ("--advantage", "joint"),
    "segment credit": ("--credit", "segment"),
}
"""Name and the flag of ``prism-align`` that sets a variant apart from the defaults."""


@dataclass(frozen=True)
class VariantsConfig:
    """The method's variants beside one another on held-out scenes of the mini world."""

    output: Path
    """folder for variants.json, report.html and the warm-started discriminators, which a later run takes as they are"""
    seeds: Annotated[int, AT_LEAST_ONE] = 1
    """independent alignment runs of every variant"""
    steps: Annotated[int, AT_LEAST_ONE] = 30
    """alignment steps of a run"""
    scenes: Annotated[int, AT_LEAST_ONE] = 256
    """held-out scenes, the same for every variant and seed"""
    data_parallel: Annotated[int, AT_LEAST_ONE] = 2
    """processes to start"""
    warm_start_steps: Annotated[int, AT_LEAST_ONE] = 80
    """steps of warm-start for every kind of discriminator"""


def variant(name: str) -> AlignConfig:
    """The mini world's recipe with the variant's flag."""
    return parse_over(MINI_ALIGN, VARIANTS[name], description=name)
