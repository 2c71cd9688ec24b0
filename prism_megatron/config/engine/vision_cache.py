"""Where features of a frozen vision tower are kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from prism_megatron.config.architecture.model import ALL_VISION, FreezeGroup
from prism_megatron.config.fields import OnResume, Range
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class VisionCacheConfig:
    """A folder that any number of runs may share."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    cache_vision: Path | None = None
    """folder that keeps what the frozen vision tower and projector make of every image, for later epochs and runs"""
    cache_vision_gb: Annotated[float, Range(at_least=0.01)] = 100.0
    """gigabytes (10^9 bytes) that the folder of --cache-vision may have; what was used longest ago is removed first"""


def check_vision_cache(config: VisionCacheConfig, freeze: Collection[FreezeGroup]) -> None:
    """Raise ConfigError for a cache of what training changes, or for a bound of no cache."""
    if config.cache_vision is None:
        if config.cache_vision_gb != VisionCacheConfig().cache_vision_gb:
            raise ConfigError("--cache-vision-gb bounds the folder of --cache-vision; name one, or leave it out")
        return
    trained = [part for part in ALL_VISION if part not in freeze]
    if trained:
        raise ConfigError(
            f"--cache-vision keeps features of a frozen tower, and this run trains the {' and '.join(trained)}; add "
            "--freeze vision projector, or leave --cache-vision out"
        )
    if config.cache_vision.exists() and not config.cache_vision.is_dir():
        raise ConfigError(f"--cache-vision {config.cache_vision} is not a folder; name one, or a path that is free")
