"""The driver with a stage that trains nothing: which steps are played, kept, shown and saved, in which order."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.run import RunConfig
from prism_megatron.engine.host.garbage import GarbageCollection
from prism_megatron.errors import NothingTrainsError, PrismError, RunStopped
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.observability.progress import Columns
from prism_megatron.run.driver import _claim, play
from prism_megatron.run.ending.idle import Idleness
from prism_megatron.run.reporting import Reporter
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Outcome
from prism_megatron.run.start import Start

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
    best_steps: tuple[int, ...] = ()
    ended: str | None = None
    idle_steps: Collection[int] = ()
    wish_in: int | None = None
    data_counts: dict[str, int] = field(default_factory=dict)
    """a step during which somebody wishes the run to end"""
    name: str = "counting"
    title: str = "Counting"
    total_steps: int = 9
    view: StageView = VIEW
    played: list[int] = field(default_factory=list)

    def play(self, step: int) -> Outcome:
        self.played.append(step)
        with self.session.timers.phase("counting"):
            row: Mapping[str, Any] = {"step": step, "seen": 10 * step}
        if step == self.wish_in:
            signal.raise_signal(signal.SIGTERM)
        rests = step in self.idle_steps
        return Outcome(
            row,
            "stop" if step == self.stops_at else "go on",
            good=step not in self.bad_steps,
            best=step in self.best_steps,
            lines=[f"saw {step}"],
            learned=() if rests else ("policy",),
            idle={"policy": "it rained"} if rests else {},
        )

    def samples(self) -> list[Any]:
        return []

    def finished(self) -> str | None:
        return self.ended


@dataclass
class Saves:
    """Stands where checkpoints are written."""

    saved: list[tuple[int, int, bool]] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    run: str = "r1"
    polls_until_there: int | None = None
    """how often a save that goes on beside the steps is asked for; None where saves are there at once"""
    events: list[str] = field(default_factory=list)
    under_way: Path | None = None
    _polls: int = 0

    def save(self, _stage: Any, step: int, *, seed: int, good: bool, best: bool, idle: Any) -> Path:
        assert idle.keys() == {"on_end", "ever", "reasons"}
        assert self.under_way is None
        self.saved.append((step, seed, good))
        self.best += [step] if best else []
        if self.polls_until_there is not None:
            self.under_way, self._polls = Path(f"step_{step}"), self.polls_until_there
            self.events.append(f"begin {step}")
        return Path(f"step_{step}")

    def poll(self) -> Path | None:
        self._polls -= 1
        return self.settle() if self.under_way is not None and self._polls <= 0 else None

    def settle(self) -> Path | None:
        done, self.under_way = self.under_way, None
        if done is not None:
            self.events.append(f"{done.name} is there")
        return done

    def abandon(self) -> None:
        self.events.append("abandoned")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_megatron.parallel.collectives.all_gather_objects", lambda value: [value])
    monkeypatch.setattr("prism_megatron.run.driver.on_main", lambda work: work())


def ended(
    tmp_path: Path, steps: range, *, run: RunConfig | None = None, **stage: Any
) -> tuple[PrismError | None, Counting, list[tuple[int, int, bool]], list[Any]]:
    session = Session(WORLD, tmp_path)
    saves: Any = Saves()
    session.checkpoints = saves
    counting: Any = Counting(session, **stage)
    session.idleness = Idleness(run.max_idle_steps if run else 20)
    with session.stopping:
        problem = play(session, counting, steps, Config(run=run or RunConfig()), Reporter(session, counting, every=100))
    path = tmp_path / "metrics.jsonl"
    return problem, counting, saves.saved, read_metrics(path) if path.exists() else []


def driven(tmp_path: Path, steps: range, **stage: Any) -> tuple[Counting, list[tuple[int, int, bool]], list[Any]]:
    problem, played, saved, rows = ended(tmp_path, steps, **stage)
    assert problem is None
    return played, saved, rows


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


def test_garbage_is_collected_before_its_steps_whatever_stage_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: the number of --manual-gc is taken over, every step is told, and Python gets its collection back."""
    steps: list[str] = []
    monkeypatch.setattr(GarbageCollection, "begin", lambda _self, every: steps.append(f"begin {every}"))
    monkeypatch.setattr(GarbageCollection, "before_step", lambda _self: steps.append("before"))
    monkeypatch.setattr(GarbageCollection, "close", lambda _self: steps.append("close"))
    ended(tmp_path, range(2), run=RunConfig(manual_gc=2))
    assert steps == ["begin 2", "before", "before", "close"]


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


def test_a_wish_is_granted_after_the_whole_step(tmp_path: Path) -> None:
    """Claim: the step under way is played to its end, kept in a checkpoint of its own, and the last one of all."""
    problem, stage, saved, rows = ended(tmp_path, range(9), wish_in=2)
    assert isinstance(problem, RunStopped)
    assert "stopped by SIGTERM after step 3; go on with `" in str(problem)
    assert stage.played == [0, 1, 2] and len(rows) == 3
    assert saved == [(2, 3, True), (3, 3, True)]
    (tmp_path / "even").mkdir()
    problem, stage, saved, _ = ended(tmp_path / "even", range(9), wish_in=1)
    assert isinstance(problem, RunStopped) and saved == [(2, 3, True)], "what is saved is not saved twice"


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: it is asked for once a step, waited for before the next save and when the run is asked to end."""
    for wish_in, events in (
        (None, ["begin 2", "step_2 is there", "begin 4", "step_4 is there", "begin 6"]),
        (2, ["begin 2", "step_2 is there", "begin 3", "step_3 is there"]),
    ):
        session, saves = Session(WORLD, tmp_path), Saves(polls_until_there=2 if wish_in is None else 9)
        session.checkpoints = saves  # type: ignore[assignment]  # as far as the driver needs it
        session.idleness = Idleness(20)
        stage: Any = Counting(session, wish_in=wish_in)
        with session.stopping:
            play(session, stage, range(6), Config(), Reporter(session, stage, every=100))
        assert saves.events == events
        assert session.checkpoints.under_way == (None if wish_in else Path("step_6"))
    shown = capsys.readouterr().out
    assert "copied step_2 in " in shown and "saved step_2\n" in shown
    session.close()
    assert saves.events[-1] == "abandoned", "a session that ends in an error waits for no save"


def test_a_stopped_bad_step_is_no_step_to_go_back_to(tmp_path: Path) -> None:
    assert ended(tmp_path, range(9), wish_in=2, bad_steps=(2,))[2][-1] == (3, 3, False)


def test_the_best_step_is_saved_as_such(tmp_path: Path) -> None:
    session, saves = Session(WORLD, tmp_path), Saves()
    session.checkpoints = saves  # type: ignore[assignment]  # as far as the driver needs it
    session.idleness = Idleness(20)
    stage: Any = Counting(session, best_steps=(3, 4))
    with session.stopping:
        play(session, stage, range(7), Config(), Reporter(session, stage, every=100))
    assert [step for step, _, _ in saves.saved] == [2, 4, 6, 7] and saves.best == [4]


def test_time_that_is_up_ends_a_run(tmp_path: Path) -> None:
    session = Session(WORLD, tmp_path, max_minutes=1e-9)
    assert session.stopping.wish == "--max-minutes 1e-09"


def test_a_run_in_which_nothing_trains_says_so_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: at once in the first steps, then ever more rarely; and the run ends after as many as were allowed."""
    problem, stage, saved, _ = ended(tmp_path, range(9), run=RunConfig(max_idle_steps=5), idle_steps=range(9))
    assert isinstance(problem, NothingTrainsError) and problem.status == 4
    assert str(problem) == (
        "stopped after step 5: the policy learned nothing in the last 5 steps (--max-idle-steps): it rained"
    )
    assert stage.played == [0, 1, 2, 3, 4]
    assert saved == [(2, 3, True), (4, 3, True)], "what taught nothing is worth no checkpoint of its own"
    shown = capsys.readouterr().out
    assert shown.count("WARNING: the policy learned nothing in") == 4
    assert "WARNING: the policy learned nothing in this step: it rained" in shown


def test_steps_that_teach_begin_the_count_again(tmp_path: Path) -> None:
    problem, stage, _, _ = ended(tmp_path, range(9), run=RunConfig(max_idle_steps=3), idle_steps=(0, 1, 3, 4, 6, 7))
    assert problem is None and len(stage.played) == 9


@pytest.mark.parametrize("limit", [0, 20])
def test_a_run_that_never_trained_anything_is_no_success(limit: int, tmp_path: Path) -> None:
    problem, stage, saved, _ = ended(tmp_path, range(4), run=RunConfig(max_idle_steps=limit), idle_steps=range(4))
    assert isinstance(problem, NothingTrainsError)
    assert str(problem) == "no step of 4 trained the policy: it rained"
    assert len(stage.played) == 4 and saved[-1][0] == 4


def test_one_step_that_taught_is_enough(tmp_path: Path) -> None:
    assert ended(tmp_path, range(4), idle_steps=(0, 1, 3))[0] is None


def test_an_earlier_part_that_taught_counts_too(tmp_path: Path) -> None:
    """Claim: a run that goes on remembers who ever learned, and how long a role has been idle."""
    session = Session(WORLD, tmp_path)
    session.checkpoints = Saves()  # type: ignore[assignment]  # as far as the driver needs it
    session.idleness = Idleness(20)
    session.idleness.see(("policy",), {})
    stage: Any = Counting(session, idle_steps=(3,))
    with session.stopping:
        assert play(session, stage, range(3, 4), Config(), Reporter(session, stage, every=100)) is None


def test_a_run_in_which_nothing_trained_is_no_success_the_second_time(tmp_path: Path) -> None:
    """Claim: going on with a run at its end does not make a success of it."""
    session = Session(WORLD, tmp_path)
    session.idleness = Idleness(20)
    session.idleness.see((), {"policy": "it rained"})
    stage: Any = Counting(session)
    problem = play(session, stage, range(4, 4), Config(), Reporter(session, stage, every=100))
    assert str(problem) == "no step of 4 trained the policy: it rained"


def test_what_a_try_left_is_moved_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "format_sft").mkdir()
    assert _claim(Start(tmp_path, "r1", begins_anew=True), kind="align") == (tmp_path, False)
    assert (tmp_path / "earlier-1" / "format_sft").is_dir() and not (tmp_path / "format_sft").exists()
    assert _claim(Start(tmp_path / "new", "r1"), kind="align") == (tmp_path / "new", True)


def test_what_a_killed_try_had_half_written_is_gone(tmp_path: Path) -> None:
    """Claim: before anything is built, so that room is there again; a new folder has none of it."""
    (tmp_path / ".hf.12ab34cd").mkdir()
    _claim(Start(tmp_path, "r1"), kind="align")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_kept_aside(tmp_path: Path) -> None:
    """Claim: under a name that no checkpoint has, in place of one that was damaged before."""
    damaged = tmp_path / "checkpoints" / "step_000004"
    for content in ("first", "second"):
        damaged.mkdir(parents=True)
        (damaged / "state.json").write_text(content)
        _claim(Start(tmp_path, "r1", damaged=(damaged,)), kind="align")
        assert [path.name for path in damaged.parent.iterdir()] == ["damaged-step_000004"]
        assert (damaged.parent / "damaged-step_000004" / "state.json").read_text() == content
