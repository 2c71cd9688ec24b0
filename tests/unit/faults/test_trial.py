"""A trial of the fault campaign with a stand-in for the tool: what is right passes, and every planted lie is noticed.

Blind spot: the tools themselves, which ``make faults`` plays.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults import processes, trial
from tests.faults.draw import ROLES, Setting, Trial
from tests.faults.stages import Inputs
from tests.faults.trial import Reference, play, play_reference

STAND_IN = Path(__file__).with_name("stand_in.py")
SETTING = Setting("sft")
POWER = Trial("0-0", SETTING, torchrun=False, fault="power", place=0.5, delay=0.5, roles=ROLES, member=0.0, choice=0.0,
              share=0.5)  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path / "inputs")


def lying(monkeypatch: pytest.MonkeyPatch, lie: str = "") -> None:
    def command(_setting: object, _inputs: object, output: Path, *, torchrun: bool) -> list[str]:
        return [sys.executable, str(STAND_IN), str(output), lie]

    monkeypatch.setattr(trial, "command", command)
    monkeypatch.setattr(processes, "_GONE_SECONDS", 0.5)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Of the trial."""
    return tmp_path / "trial"


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch, inputs: Inputs, tmp_path: Path) -> Reference:
    lying(monkeypatch)
    return play_reference(SETTING, inputs, tmp_path / "reference")


def test_a_run_that_is_left_alone_has_its_landmarks(reference: Reference) -> None:
    """Claim: rows come without clocks, and every row is a landmark, in order."""
    assert [row["step"] for row in reference.rows] == list(range(6))
    assert all(set(row) == {"step", "loss"} for row in reference.rows)
    assert [name for name in reference.landmarks if "#" in name] == [f"metrics.jsonl#{n}" for n in range(1, 7)]


@pytest.mark.parametrize("fault", ["power", "kill", "clock"])
def test_a_run_that_goes_on_as_itself_passes(
    monkeypatch: pytest.MonkeyPatch, reference: Reference, inputs: Inputs, tmp_path: Path, fault: Any
) -> None:
    """Claim: killed where it was to be, it is started once more; a clock that jumps ends nothing."""
    outcome = play(replace(POWER, fault=fault), reference, inputs, tmp_path / "trial")
    assert outcome.complaints == []
    assert outcome.statuses == ([0] if fault == "clock" else [-9, 0])
    assert " s after metrics.jsonl#" in outcome.struck
    assert outcome.to_plain()["verdict"] == "passed" and outcome.to_plain()["tries"] == len(outcome.statuses)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ("step twice", "7 rows instead of 6"),
        ("other figure", "loss is"),
        ("leaves a process", "left: "),
        ("half a checkpoint", "step_000006 is not a complete checkpoint"),
        ("hidden rest", ".step_000006.saving was left"),
        ("cannot go on", "a later try ended with status 1"),
    ],
)
def test_a_lie_is_noticed(
    monkeypatch: pytest.MonkeyPatch, reference: Reference, place: Path, lie: str, words: str
) -> None:
    """Claim: a row too many, another figure, a process, a torn or a hidden folder, and a run that never ends well."""
    lying(monkeypatch, lie)
    outcome = play(POWER, reference, Inputs(place), place)
    assert any(words in complaint for complaint in outcome.complaints), outcome.complaints
    assert outcome.to_plain()["verdict"] == "failed"
    assert processes.left(f"{POWER.seed}-{os.getpid()}", seconds=5.0) == [], "a trial leaves nobody itself"


def test_a_run_that_fails_by_itself_is_no_reference(
    monkeypatch: pytest.MonkeyPatch, inputs: Inputs, tmp_path: Path
) -> None:
    lying(monkeypatch, "kills itself")
    with pytest.raises(RuntimeError, match="although nothing befell it"):
        play_reference(SETTING, inputs, tmp_path / "reference")


def test_a_run_that_hangs_is_ended_and_fails(
    monkeypatch: pytest.MonkeyPatch, reference: Reference, inputs: Inputs, tmp_path: Path
) -> None:
    """Claim: what is not done within its time is a failure, and is ended."""
    hanging = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(trial, "command", lambda *_, **__: hanging)
    monkeypatch.setattr(trial, "_PATIENCE_SECONDS", 0.3)
    outcome = play(replace(POWER, fault="clock"), reference, inputs, tmp_path / "trial")
    assert "it hung for 0 s and was ended" in outcome.complaints
    assert processes.left(f"{POWER.seed}-{os.getpid()}", seconds=5.0) == []
