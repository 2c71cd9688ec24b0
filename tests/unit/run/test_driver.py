"""The driver with a stage that trains nothing: which steps are played, kept, shown and saved, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.run import RunConfig
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.observability.progress import Columns
from prism_megatron.run.driver import play
from prism_megatron.run.reporting import Reporter
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Outcome

WORLD: Any = SimpleNamespace(is_main=True, world_size=1, layout={}, device=torch.device("cpu"))


VIEW = StageView(
    Columns("    ", "seen", lambda row: f"{row['seen']:>4}"),
    summarise=lambda rows: {"seen": [row["seen"] for row in rows]},
    tables=lambda summary: [f"<p>seen {summary['seen']}</p>"],
    charts=lambda _rows: [],
)


@dataclass
class Config:
    """What the driver reads of a configuration."""

    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(save_every=2))
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 3


@dataclass
class Counting:
    """A stage whose step s has s valid rollouts; it stops, or is bad, where it is told to."""

    session: Session
    stops_at: int | None = None
    bad_steps: tuple[int, ...] = ()
    ended: str | None = None
    name: str = "counting"
    title: str = "Counting"
    total_steps: int = 9
    view: StageView = VIEW
    played: list[int] = field(default_factory=list)

    def play(self, step: int) -> Outcome:
        self.played.append(step)
        with self.session.timers.phase("counting"):
            row: Mapping[str, Any] = {"step": step, "seen": 10 * step}
        return Outcome(
            row, "stop" if step == self.stops_at else "go on", good=step not in self.bad_steps, lines=[f"saw {step}"]
        )

    def samples(self) -> list[Any]:
        return []

    def finished(self) -> str | None:
        return self.ended


@dataclass
class Saves:
    """Stands where checkpoints are written."""

    saved: list[tuple[int, int, bool]] = field(default_factory=list)

    def save(self, _stage: Any, step: int, *, seed: int, good: bool) -> Path:
        self.saved.append((step, seed, good))
        return Path(f"step_{step}")


def driven(tmp_path: Path, steps: range, **stage: Any) -> tuple[Counting, list[tuple[int, int, bool]], list[Any]]:
    session = Session(WORLD, tmp_path)
    saves: Any = Saves()
    session.checkpoints = saves
    counting: Any = Counting(session, **stage)
    play(session, counting, steps, Config(), Reporter(session, counting, every=100))
    path = tmp_path / "metrics.jsonl"
    return counting, saves.saved, read_metrics(path) if path.exists() else []


def test_every_step_has_its_row_with_its_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: rows, the table and the stage's lines come step by step; seconds are those of the step alone."""
    stage, saved, rows = driven(tmp_path, range(5), bad_steps=(1,))
    assert stage.played == [0, 1, 2, 3, 4]
    assert [(row["step"], row["seen"], row["seconds/counting"] < 1.0) for row in rows] == [
        (step, 10 * step, True) for step in range(5)
    ]
    assert saved == [(2, 3, False), (4, 3, True), (5, 3, True)], "every second one, and the last"
    shown = capsys.readouterr().out
    assert "counting: steps 1 to 5" in shown
    positions = [shown.index(text) for text in ("| seen |", "1/5 |    0 |", "saw 0", "2/5 |   10 |", "saved step_2")]
    assert positions == sorted(positions)


def test_a_stage_that_stops_is_saved_there(tmp_path: Path) -> None:
    stage, saved, rows = driven(tmp_path, range(9), stops_at=2)
    assert stage.played == [0, 1, 2]
    assert [step for step, _, _ in saved] == [2, 3]
    assert len(rows) == 3


def test_a_run_that_goes_on_plays_the_rest(tmp_path: Path) -> None:
    driven(tmp_path, range(3))
    stage, saved, rows = driven(tmp_path, range(2, 6))
    assert stage.played == [2, 3, 4, 5]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5], "a step that is played again has one row"
    assert [step for step, _, _ in saved] == [4, 6]


def test_where_no_step_is_left_nothing_is_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, why in ((range(4, 4), None), (range(2, 4), "all is said")):
        stage, saved, rows = driven(tmp_path, steps, ended=why)
        assert (stage.played, saved, rows) == ([], [], [])
    assert "all is said" in capsys.readouterr().out
