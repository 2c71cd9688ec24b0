"""What ``make effect`` measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from prism_megatron.config.variants import VariantsConfig
from prism_megatron.errors import ConfigError


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


def check_experiment(config: EffectConfig | VariantsConfig) -> None:
    """Raise ConfigError for a count below 1."""
    for name, value in asdict(config).items():
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
