"""When summary and report are written, what they know of the run, and that a report never ends a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.evaluation.sample import Sample, read_samples
from prism_megatron.observability.metrics import MetricsWriter, Row
from prism_megatron.run import reporting
from prism_megatron.run.record import read_record
from prism_megatron.run.reporting import Reporter
from prism_megatron.run.stage import Artefacts
from prism_megatron.stages.warm_start.view import VIEW

NOW = datetime(2026, 11, 28, 22, 58, 29, tzinfo=UTC)


@dataclass
class Told:
    """A stage whose answers are those that it was given."""

    name: str = "warm-start"
    title: str = "Warm-start of a test"
    view: Any = VIEW
    total_steps: int = 6
    answers: list[Sample] = field(default_factory=list)
    data_counts: dict[str, int] = field(default_factory=lambda: {"lines": 3, "kept": 2, "no_caption": 1})

    def samples(self) -> Sequence[Sample]:
        return self.answers


def session(output: Path, *, is_main: bool = True) -> Any:
    world = SimpleNamespace(is_main=is_main, world_size=2, layout={"tp": 2, "pp": 1})
    lines: list[str] = []
    own = SimpleNamespace(run=None)
    return SimpleNamespace(
        world=world, output=output, other_seconds={"build": 1.5}, say=lines.append, lines=lines, checkpoints=own
    )


def reporter(one: Any, stage: Told, *, every: int = 2, now: datetime = NOW) -> Reporter:
    told: Any = stage
    return Reporter(one, told, every=every, now=lambda: now)


def play(reporter: Reporter, output: Path, steps: range) -> list[int]:
    """How many steps summary.json knows of after each of them."""
    writer = MetricsWriter(output / "metrics.jsonl", first_step=steps.start)
    reporter.begin(steps.start)
    seen = []
    for step in steps:
        row = {"step": step, "seconds/pairs": 1.0, "response_tokens": 10}
        writer.write(row)
        reporter.step(row)
        seen.append(summary_of(output).get("steps", 0))
    writer.close()
    return seen


def summary_of(output: Path) -> dict[str, Any]:
    path = output / "summary.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return document


def test_reports_come_every_so_many_steps(tmp_path: Path) -> None:
    stage = Told(answers=[Sample([], "q", "a", "r", None)])
    assert play(reporter(session(tmp_path), stage), tmp_path, range(5)) == [0, 2, 2, 4, 4]
    summary = summary_of(tmp_path)
    assert summary["ended"] is None
    assert summary["seconds_by_phase"] == {"build": 1.5, "pairs": 4.0}
    assert summary["data"] == {"lines": 3, "kept": 2, "no_caption": 1}
    assert "Warm-start of a test" in (tmp_path / "report.html").read_text()
    assert read_samples(tmp_path / "samples.json") == stage.answers


def test_what_a_run_is_stands_there_from_the_first_step_and_stays(tmp_path: Path) -> None:
    """Claim: a run that goes on keeps its id and its start, and its layout is the newest."""
    play(reporter(session(tmp_path), Told()), tmp_path, range(1))
    first = read_record(tmp_path / "run.json")
    assert first is not None
    assert first.data == {"lines": 3, "kept": 2, "no_caption": 1}
    assert (first.stage, first.created, first.layout) == ("warm-start", "2026-11-28T22:58:29Z", {"tp": 2, "pp": 1})
    again = session(tmp_path)
    again.world.layout = {"tp": 1, "pp": 2}
    reporter(again, Told(total_steps=9), now=NOW.replace(year=2027)).begin(1)
    second = read_record(tmp_path / "run.json")
    assert second is not None
    assert (second.id, second.created) == (first.id, first.created)
    assert (second.layout, second.total_steps) == ({"tp": 1, "pp": 2}, 9)


def test_a_run_that_goes_on_has_not_ended_and_keeps_its_answers(tmp_path: Path) -> None:
    stage = Told(answers=[Sample([], "q", "a", "r", None)])
    one = reporter(session(tmp_path), stage)
    one.ended = "all steps are played"
    play(one, tmp_path, range(4))
    assert summary_of(tmp_path)["ended"] == "all steps are played"
    play(reporter(session(tmp_path), Told()), tmp_path, range(3, 4))
    assert summary_of(tmp_path)["ended"] is None
    assert read_samples(tmp_path / "samples.json") == stage.answers


def test_an_end_is_written_with_what_the_stage_found(tmp_path: Path) -> None:
    one = session(tmp_path)
    report = reporter(one, Told(), every=100)
    play(report, tmp_path, range(1))
    assert summary_of(tmp_path) == {}
    report.finish(Artefacts(tmp_path / "hf", "warmed-up discriminator", {"held_out": None}))
    summary = summary_of(tmp_path)
    assert [summary[key] for key in ("exported", "hf_export", "ended")] == [
        "warmed-up discriminator", str(tmp_path / "hf"), "done",
    ]  # fmt: skip
    assert one.lines[-1].startswith(f"done: {tmp_path / 'summary.json'}")


def test_a_run_that_breaks_down_is_reported_as_far_as_it_came(tmp_path: Path) -> None:

    def break_down() -> None:
        with reporter(session(tmp_path), Told(), every=100) as report:
            play(report, tmp_path, range(3))
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        break_down()
    assert summary_of(tmp_path)["steps"] == 3


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any, **_keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    one = session(tmp_path)
    monkeypatch.setattr(reporting, "write_summary", full)
    play(reporter(one, Told()), tmp_path, range(4))
    assert len(one.lines) == 2
    assert "No space left on device" in one.lines[0]


class Kept:
    """A sink that keeps its rows."""

    def __init__(self, output: Path) -> None:
        self.steps: list[Any] = []
        self.report_at_the_end: bool | None = None
        self.output = output

    def write(self, row: Row) -> None:
        self.steps.append(row["step"])

    def close(self) -> None:
        self.report_at_the_end = (self.output / "report.html").exists()


def test_sinks_get_every_row_of_this_command_and_are_closed_after_the_last_report(tmp_path: Path) -> None:
    """Claim: after a failure too; they are opened for the run's own record and the command's first step."""
    play(reporter(session(tmp_path), Told()), tmp_path, range(1))
    (tmp_path / "report.html").unlink(missing_ok=True)
    kept, asked = Kept(tmp_path), list[Any]()

    def opened(record: Any, first_step: int) -> list[Any]:
        asked.append((record, first_step))
        return [kept]

    told: Any = Told()

    def break_down() -> None:
        with Reporter(session(tmp_path), told, every=100, open_sinks=opened) as report:
            play(report, tmp_path, range(1, 3))
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        break_down()
    assert asked == [(read_record(tmp_path / "run.json"), 1)]
    assert kept.steps == [1, 2]
    assert kept.report_at_the_end is True


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    report = reporter(session(tmp_path, is_main=False), Told(), every=1)
    with report:
        report.begin(0)
        report.step({"step": 0})
        report.finish(Artefacts(tmp_path / "hf"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_early_says_why_and_how_far_it_came(tmp_path: Path) -> None:
    report = reporter(session(tmp_path), Told(), every=100)
    play(report, tmp_path, range(2))
    report.stop("stopped by SIGTERM after step 2")
    summary = summary_of(tmp_path)
    assert (summary["steps"], summary["ended"]) == (2, "stopped by SIGTERM after step 2")
    assert summary["hf_export"] is None


def test_a_run_that_fails_says_so_in_its_summary(tmp_path: Path) -> None:
    report = reporter(session(tmp_path), Told(), every=100)
    play(report, tmp_path, range(2))
    report.__exit__(RuntimeError, RuntimeError("a collective\nbroke"), None)
    assert summary_of(tmp_path)["ended"] == "failed: a collective broke"


def test_a_run_that_ends_elsewhere_without_a_step_is_reported_too(tmp_path: Path) -> None:
    """Claim: going on with a finished run in a new folder leaves its export and a summary, though there is no row."""
    report = reporter(session(tmp_path), Told(), every=100)
    report.finish(Artefacts(tmp_path / "hf", "aligned policy"))
    assert summary_of(tmp_path)["steps"] == 0 and summary_of(tmp_path)["ended"] == "done"
