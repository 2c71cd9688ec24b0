"""From flags to processes: what is refused starts none, and what is not starts as many as it takes.

Blind spot: the processes (``tests/integration/test_launch.py``, and the tests of each tool).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from prism_megatron.commands.starting import on_ranks
from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.commands.starting.on_ranks import in_world, main_on_ranks
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine import runtime
from prism_megatron.engine.launch import PRELOAD
from prism_megatron.errors import CheckpointError, ConfigError, PrismError


@dataclass(frozen=True)
class Config:
    parallel: ParallelConfig
    seed: int = 7
    ranks: int = 3


CONFIG = Config(ParallelConfig(tp=2, pp=2, ep=4))


def parse(argv: Sequence[str]) -> Config:
    if "bad" in argv:
        raise ConfigError("a bad flag")
    return replace(CONFIG, seed=len(argv))


def check(config: Config) -> None:
    if config.seed == 2:
        raise CheckpointError("no such checkpoint")


def run(config: Config) -> None:
    raise AssertionError("only ranks run it")


def test_what_is_refused_starts_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(on_ranks, "launch")
    for argv, said in ((["bad"], "error: a bad flag\n"), (["a", "b"], "error: no such checkpoint\n")):
        assert main_on_ranks(argv, parse=parse, check=check, run=run, preload="x") == PrismError.status
        assert capsys.readouterr().err == said


def test_as_many_processes_as_the_layout_takes_or_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: what forked ranks find imported is what all find, and the command's own; the status is the launcher's."""
    launched: list[dict[str, Any]] = []

    def launch(fn: Any, config: Config, **named: Any) -> int:
        launched.append({"fn": fn, "seed": config.seed, **named})
        return 5

    monkeypatch.setattr(on_ranks, "launch", launch)
    monkeypatch.setattr("sys.argv", ["prism-x", "1", "2", "3"])
    assert main_on_ranks(None, parse=parse, check=check, run=run, preload="own") == 5
    main_on_ranks(["1"], parse=parse, check=check, run=run, preload="own", processes=lambda config: config.ranks)
    wanted = {"fn": run, "model_parallel_size": 4, "preload": (*PRELOAD, "own")}
    assert launched == [{**wanted, "seed": 3, "world_size": 8}, {**wanted, "seed": 1, "world_size": 3}]


def test_ranks_get_the_configuration_that_the_forecast_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: what was asked for and settled is what is launched; nothing is, where a run is not to begin."""
    launched: list[Config] = []

    def launch(_fn: Any, config: Config, **_named: Any) -> int:
        launched.append(config)
        return 0

    def foretell(config: Config, _first: FirstRank) -> Config | None:
        return None if config.seed else replace(config, seed=70)

    monkeypatch.setattr(on_ranks, "launch", launch)
    for argv in ([], ["1"]):
        assert main_on_ranks(argv, parse=parse, check=check, run=run, foretell=foretell, preload="x") == 0
    assert [config.seed for config in launched] == [70]


def test_work_is_done_in_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def start(parallel: ParallelConfig, *, seed: int) -> str:
        done.append(("start", parallel, seed))
        return "world"

    monkeypatch.setattr(runtime, "start", start)
    monkeypatch.setattr(runtime, "stop", lambda world: done.append(("stop", world)))
    in_world(CONFIG, lambda world, config: done.append((world, config)))
    assert done == [("start", CONFIG.parallel, 7), ("world", CONFIG), ("stop", "world")]
