"""What a step needs of a device is found out once, by rank 0, and what follows from it holds for all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.config.engine.forecast import ForecastConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.engine.launch import has_gpu, quiet_vendors

if TYPE_CHECKING:
    from prism_megatron.forecast.build import Planned


class Foretells(Protocol):
    """A configuration whose steps can be played."""

    @property
    def forecast(self) -> ForecastConfig: ...

    @property
    def recompute(self) -> RecomputeConfig: ...


ConfigT = TypeVar("ConfigT", bound=Foretells)


def foretold(config: ConfigT, plan: Callable[[], Planned], first: FirstRank) -> ConfigT | None:
    """The configuration to begin with, in which --recompute is settled; None where the run is not to begin.

    ``plan`` says what is to be played; where nothing is, it is not called. Raises ConfigError on all ranks for what a
    device does not hold.
    """
    if config.forecast.forecast == "off":
        return config
    # Who asks rank 0 must not depend on the host: others may have no GPU, or another one.
    recompute = _read(first.decides(lambda: json.dumps(_settle(config, plan))))
    changed: Any = config
    return None if recompute is None else replace(changed, recompute=recompute)


def wants_forecast(config: Foretells) -> bool:
    """Whether there is anything to hold a step against, or the counts themselves are asked for."""
    settings = config.forecast
    if settings.forecast == "only" or config.recompute.recompute == "auto":
        return True
    return settings.forecast == "auto" and (settings.device_gib is not None or has_gpu())


def _settle(config: Foretells, plan: Callable[[], Planned]) -> dict[str, Any] | None:
    if not wants_forecast(config):
        return asdict(config.recompute)
    quiet_vendors()
    from prism_megatron.forecast.before_start import foretell

    settled = foretell(plan())
    return None if settled is None else asdict(settled)


def _read(text: str) -> RecomputeConfig | None:
    fields = json.loads(text)
    if fields is None:
        return None
    return RecomputeConfig(**{**fields, "recompute_modules": tuple(fields["recompute_modules"])})
