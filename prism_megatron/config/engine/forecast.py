"""Whether it is looked at, before ranks start, what a step needs of a device's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.engine.recompute import RecomputeConfig, check_settled
from prism_megatron.config.fields import NOT_NEGATIVE, POSITIVE, OnResume
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class ForecastConfig:
    """A step of each role is played without contents, in a process that has no device (docs/device_pass.md)."""

    ON_RESUME: ClassVar[OnResume] = OnResume.COMMAND

    forecast: Literal["auto", "off", "only"] = "auto"
    """auto: where a GPU is there, or --device-gib is given, count a step's memory first, and refuse a run that a device
    does not hold; it takes minutes of a CPU for billions of weights. off: start at once. only: print the counts and
    end"""
    device_gib: Annotated[float | None, POSITIVE] = None
    """memory of one device in GiB (2^30 bytes); by default that of the smallest GPU of this host"""
    device_reserve_gib: Annotated[float, NOT_NEGATIVE] = 4.0
    """GiB that are kept free for what is not counted: an allocator's rounding, NCCL's and cuBLAS's buffers"""


def check_forecast(config: ForecastConfig, recompute: RecomputeConfig) -> None:
    """Raise ConfigError for a reserve that leaves nothing of the device, and for a forecast that is wanted and off."""
    if config.device_gib is not None and config.device_reserve_gib >= config.device_gib:
        raise ConfigError(
            f"--device-reserve-gib {config.device_reserve_gib:g} leaves nothing of --device-gib {config.device_gib:g}; "
            "give a smaller reserve"
        )
    if config.forecast == "off" and config.device_gib is not None:
        raise ConfigError("--device-gib is what a forecast is held against, and --forecast off makes none; drop one")
    if config.forecast == "off":
        check_settled(recompute)
