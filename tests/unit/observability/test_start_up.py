"""Phases from a command to its first row."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from prism_megatron.observability import start_up


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRISM_START_UP", raising=False)


def test_phases_are_what_lies_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: from the making of the process on, one after the other; a phase that comes twice is added up."""
    began = psutil.Process().create_time()
    start_up.begin()
    for phase, at in (("flags", 2.0), ("ranks", 5.5), ("flags", 6.0)):
        monkeypatch.setattr(start_up.time, "time", lambda at=at: began + at)  # type: ignore[attr-defined]
        start_up.mark(phase)
    assert start_up.phases() == pytest.approx({"flags": 2.5, "ranks": 3.5}, abs=1e-5)
    assert start_up.told() == "6.0 s from the command to the first row: flags 2.5, ranks 3.5"


def test_a_command_begins_anew_and_a_library_notes_nothing() -> None:
    """Claim: marks of a command above are not this one's; without a command there are none."""
    start_up.mark("flags")
    assert start_up.phases() == {}
    start_up.begin()
    start_up.mark("flags")
    start_up.begin()
    assert start_up.phases() == {}


def test_marks_pass_to_processes_below() -> None:
    start_up.begin()
    start_up.mark("flags")
    below = "from prism_megatron.observability import start_up as s; s.mark('ranks'); print(*s.phases())"
    said = subprocess.run([sys.executable, "-c", below], capture_output=True, text=True, check=True, env=os.environ)
    assert said.stdout.split() == ["flags", "ranks"]
