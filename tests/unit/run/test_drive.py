"""A whole run of a scripted stage: what befalls it is one line that says how to go on; refusals leave no trace.

Blind spot: checkpoints, which a stage without engines has none of.
"""

from __future__ import annotations

import errno
import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.run import RunConfig
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.engine.runtime import World
from prism_megatron.errors import (
    DataError,
    DiskError,
    LostRankError,
    PrismError,
    RolloutError,
    RunStopped,
    WeightSyncError,
)
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.observability.progress import Columns
from prism_megatron.run.driver import drive
from prism_megatron.run.ending.peers import Loss, Peers
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Artefacts, Outcome

VIEW = StageView(Columns("", "", lambda _row: ""), lambda _rows: {}, lambda _summary: [], lambda _rows: [])


class Scripted:
    """A stage that does in step 1 what it is told to."""

    name, title, total_steps, view, may_go_back = "align", "Scripted", 3, VIEW, False
    models: dict[str, Any] = {}  # noqa: RUF012
    identity: dict[str, Any] = {}  # noqa: RUF012
    data_counts: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, session: Session, in_step: Callable[[], None]) -> None:
        self.session, self.in_step, self.closed = session, in_step, 0

    def engines(self) -> dict[str, Any]:
        return {}

    def prepare(self, first_step: int) -> None:
        assert first_step == 0

    def finished(self) -> str | None:
        return None

    def play(self, step: int) -> Outcome:
        if step == 1:
            self.in_step()
        return Outcome({"step": step}, learned=("policy",))

    def samples(self) -> list[Any]:
        return []

    def finish(self, output: Path) -> Artefacts:
        return Artefacts(output / "hf", "nothing")

    def close(self) -> None:
        self.closed += 1


def raises(error: BaseException) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


@pytest.fixture(autouse=True)
def _saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_megatron.run.checkpoints.Checkpoints.save", lambda self, *_, **__: self.output)
    monkeypatch.setattr("sys.argv", ["t.py"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def run(world: World, output: Path, in_step: Callable[[], None]) -> Scripted:
    config = replace(AlignConfig(), checkpoint=CheckpointConfig(output=output), run=RunConfig(report_every=1))
    built: list[Scripted] = []

    def build(_config: AlignConfig, session: Session) -> Any:
        built.append(Scripted(session, in_step))
        return built[0]

    try:
        drive(world, config, build, kind="align")
    finally:
        if built:
            assert built[0].closed > 0, "what samples is always released"
    return built[0]


def test_a_silence_while_the_stage_is_built_is_broken(world: World, tmp_path: Path) -> None:
    """Claim: checking data and loading weights may take long; the thread that says so lives then, and not after."""
    config = replace(AlignConfig(), checkpoint=CheckpointConfig(output=tmp_path / "run"))
    alive: list[int] = []

    def beats() -> int:
        return sum(thread.name == "heartbeat" for thread in threading.enumerate())

    def build(_config: AlignConfig, session: Session) -> Any:
        alive.append(beats())
        return Scripted(session, lambda: None)

    before = beats()
    drive(world, config, build, kind="align")
    assert alive == [before + 1] and beats() == before


def test_the_end_of_a_run_waits_for_the_checkpoint_under_way(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: what is exported at the end finds the last checkpoint, however long that was written."""
    order: list[str] = []
    under_way: list[Path] = []

    def save(_self: Any, _stage: Any, step: int, **_: Any) -> Path:
        under_way.append(tmp_path / f"step_{step}")
        return under_way[-1]

    def settle(_self: Any) -> Path | None:
        order.extend(path.name for path in under_way)
        return under_way.pop() if under_way else None

    monkeypatch.setattr("prism_megatron.run.checkpoints.Checkpoints.save", save)
    monkeypatch.setattr("prism_megatron.run.checkpoints.Checkpoints.settle", settle)
    monkeypatch.setattr("prism_megatron.run.checkpoints.Checkpoints.poll", lambda _self: None)
    under = property(lambda _self: under_way[-1] if under_way else None)
    monkeypatch.setattr("prism_megatron.run.checkpoints.Checkpoints.under_way", under)

    def finish(_self: Any, output: Path) -> Artefacts:
        order.append("finish")
        return Artefacts(output / "hf", "nothing")

    monkeypatch.setattr(Scripted, "finish", finish)
    run(world, tmp_path / "run", lambda: None)
    assert order == ["step_3", "finish"]


def test_a_run_that_ends_well(world: World, tmp_path: Path) -> None:
    run(world, tmp_path / "run", lambda: None)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["ended"], summary["exported"]) == ("done", "nothing")


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        (
            RolloutError("server http://127.0.0.1:7 is gone"),
            RolloutError,
            "server http://127.0.0.1:7 is gone; go on with",
        ),
        (DiskError("x cannot be written"), DiskError, "x cannot be written; make room, then go on with"),
        (
            WeightSyncError("x cannot be written: [Errno 28] No space left on device"),
            WeightSyncError,
            "left on device; make room, then go on with",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            DiskError,
            "x cannot be written: no space left on device",
        ),
    ],
)
def test_trouble_from_outside_says_how_to_go_on(
    world: World, tmp_path: Path, trouble: Exception, kind: type[PrismError], words: str
) -> None:
    output = tmp_path / "run"
    with pytest.raises(kind) as caught:
        run(world, output, raises(trouble))
    assert words in str(caught.value)
    assert str(caught.value).endswith(f"go on with `python t.py --output {output} --resume auto`")
    assert len(read_metrics(output / "metrics.jsonl")) == 1
    assert str(json.loads((output / "summary.json").read_text())["ended"]).startswith("failed: ")


def test_a_bug_keeps_its_traceback_unless_a_rank_is_gone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyError, match="bug"):
        run(world, tmp_path / "first", raises(KeyError("bug")))
    monkeypatch.setattr(Peers, "loss", lambda _self, _error: Loss("rank 5 on a ended without a word", speaker=3))
    with pytest.raises(LostRankError, match="rank 5 on a ended without a word; go on with") as caught:
        run(world, tmp_path / "second", raises(RuntimeError("Connection closed by peer")))
    assert (caught.value.speaker, caught.value.status) == (3, 1)
    last = (tmp_path / "second" / "console.log").read_text().splitlines()[-1]
    assert last == f"error: {caught.value}", "the folder tells it too"


def test_a_wish_ends_it_with_a_last_line_in_the_console_file(world: World, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(RunStopped) as caught:
        run(world, output, lambda: signal.raise_signal(signal.SIGTERM))
    assert str(caught.value).startswith("stopped by SIGTERM after step 2; ")
    assert (output / "console.log").read_text().splitlines()[-1] == str(caught.value)
    assert json.loads((output / "summary.json").read_text())["ended"] == str(caught.value)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("was_there", [False, True])
def test_a_refused_start_leaves_no_trace(world: World, tmp_path: Path, was_there: bool) -> None:
    output = tmp_path / "run"
    if was_there:
        output.mkdir()
    config = replace(AlignConfig(), checkpoint=CheckpointConfig(output=output))

    def build(_config: AlignConfig, session: Session) -> Any:
        session.say("checking")
        raise DataError("line 3: no image")

    with pytest.raises(DataError) as caught:
        drive(world, config, build, kind="align")
    assert str(caught.value) == "line 3: no image", "there is nothing to go on with"
    assert output.exists() is was_there
    assert not was_there or list(output.iterdir()) == []
