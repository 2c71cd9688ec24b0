"""A run's clocks outside its steps, and who speaks."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.observability.activity import Activity
from prism_megatron.run.session import Session


def world(*, is_main: bool) -> Any:
    return SimpleNamespace(is_main=is_main, layout={"tp": 2, "pp": 1})


def test_a_phase_that_comes_again_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: three saves of a run are told as the seconds of all three."""
    now = iter([0.0, 2.0, 10.0, 11.5, 20.0, 20.5])
    session = Session(world(is_main=True), Path(), quiet=True)
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    for _ in range(2):
        with session.phase("checkpoint"):
            pass
    with session.phase("export"):
        pass
    assert session.other_seconds == {"checkpoint": 3.5, "export": 0.5}


def test_only_the_main_rank_of_a_run_that_is_not_quiet_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    for is_main, quiet in ((False, False), (True, True)):
        Session(world(is_main=is_main), Path(), quiet=quiet).say("nobody hears this")
    session = Session(world(is_main=True), Path())
    session.say("one line")
    session.close()
    assert capsys.readouterr().out.splitlines()[0].endswith(" s  one line")
    assert session.layout_text == "tp2 pp1"


def test_what_is_said_stands_in_the_runs_folder(tmp_path: Path) -> None:
    session = Session(world(is_main=True), tmp_path)
    session.say("before")
    session.open()
    session.show_text("steps: 3")
    session.close()
    first, second = (tmp_path / "console.log").read_text().splitlines()
    assert first.endswith(" s  before")
    assert second == "steps: 3"


def test_a_run_in_silence_says_what_it_is_at_and_leaves_no_thread(tmp_path: Path) -> None:
    """Claim: the thread lives from ``begin`` to ``close``; who is watched tells this run."""

    def beats() -> int:
        return sum(thread.name == "heartbeat" for thread in threading.enumerate())

    worker = SimpleNamespace(activity=Activity())
    before = beats()
    for is_main in (True, False):
        session = Session(world(is_main=is_main), tmp_path)
        session.watch(worker, None, object())
        assert beats() == before
        session.begin()
        assert beats() == before + int(is_main)
        session.open()
        with session.timers.phase("rollout"), worker.activity.task("answers", total=2):
            assert session.activity.text().startswith("rollout, 0 of 2 answers")
        with session.phase("checkpoint"):
            assert session.activity.text().startswith("checkpoint, ")
        session.close()
        session.close()
        assert beats() == before
