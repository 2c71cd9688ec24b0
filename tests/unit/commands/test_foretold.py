"""Claim: what begins is what rank 0 says, whatever this rank's own host is like; --forecast off asks nobody."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from prism_megatron.commands.starting import foretold as module
from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.commands.starting.foretold import foretold
from prism_megatron.config.engine.forecast import ForecastConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.forecast.build import Planned


@dataclass(frozen=True)
class Config:
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    recompute: RecomputeConfig = field(default_factory=lambda: RecomputeConfig("auto", ("mlp",), recompute_vision=True))


def no_plan() -> Planned:
    raise AssertionError("rank 0 alone plays")


@pytest.mark.parametrize(
    ("answer", "begins"),
    [
        (
            '{"recompute": "selective", "recompute_modules": ["mlp"], "recompute_vision": true}',
            Config(recompute=RecomputeConfig("selective", ("mlp",), recompute_vision=True)),
        ),
        ("null", None),
    ],
    ids=["begins", "ends"],
)
def test_a_rank_does_as_rank_0_says(answer: str, begins: Config | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a host without a GPU asks as one with a GPU does, so that nobody is waited for in vain."""
    monkeypatch.setattr(FirstRank, "decides", lambda _self, _decide: answer)
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    assert foretold(Config(), no_plan, FirstRank()) == begins
    if begins is not None:
        assert foretold(Config(recompute=RecomputeConfig()), no_plan, FirstRank()) == begins


def test_without_a_forecast_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FirstRank, "decides")
    config = Config(ForecastConfig("off"), RecomputeConfig())
    assert foretold(config, no_plan, FirstRank()) is config
