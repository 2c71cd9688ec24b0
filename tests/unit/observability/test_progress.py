"""The table: one line per step, aligned, honest about missing data; one slow step does not upset the time left."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import pytest

from prism_megatron.evaluation.game_table import GAME_COLUMNS
from prism_megatron.observability.progress import Progress, format_seconds


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "perception/reward_gap": 2.345,
        "reasoning/reward_gap": -0.5,
        "perception/accuracy": 0.75,
        "reasoning/accuracy": 1.0,
        "valid_share": 0.98,
        "response_tokens": 3000,
        "seconds/rollout": 1.0,
        "seconds/policy": 0.5,
        **changes,
    }


def table(total_steps: int, stream: io.StringIO, clock: Callable[[], float] = time.monotonic) -> Progress:
    progress = Progress(stream=stream, clock=clock)
    progress.begin_table(GAME_COLUMNS, total_steps=total_steps)
    return progress


def test_a_step_is_one_line_of_figures() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = table(40, stream, clock)
    clock.now += 2.5
    progress.phase("loading the policy")
    progress.row(row(0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "    2.5 s  loading the policy"
    cells = [cell.split() for cell in lines[3].split("|")]
    assert cells == [["1/40"], ["+2.35", "-0.50"], ["0.75", "1.00"], ["0.98"], ["2,000"], ["58", "s"]]
    assert len({line.index("|") for line in lines[1:]}) == 1
    assert len({len(line) for line in lines[2:]}) == 1


def test_missing_data_is_a_dash() -> None:
    stream = io.StringIO()
    missing = {"step": 0, "reasoning/accuracy": None, "valid_share": None}
    table(2, stream).row(missing)
    assert [cell.split() for cell in stream.getvalue().splitlines()[2].split("|")] == [
        ["1/2"], ["-", "-"], ["-", "-"], ["-"], ["-"], ["-"],
    ]  # fmt: skip


def test_header_comes_again_every_twenty_rows() -> None:
    stream = io.StringIO()
    progress = table(100, stream)
    for step in range(41):
        progress.row(row(step))
    assert [i for i, line in enumerate(stream.getvalue().splitlines()) if "time left" in line] == [1, 23, 45]


def test_time_left_counts_whole_steps_and_ignores_one_slow_one() -> None:
    """Steps take 4 s of wall time though phases say 1.5; one took 60 (a checkpoint)."""
    stream, clock = io.StringIO(), Clock()
    progress = table(20, stream, clock)
    for step, seconds in enumerate([4, 4, 60, 4, 4, 4]):
        clock.now += seconds
        progress.row(row(step))
    assert stream.getvalue().splitlines()[-1].endswith("    56 s")


def test_a_phase_between_two_steps_is_no_part_of_either() -> None:
    """The second step's line comes 100 s after a phase began, and its own phases say 1.5 s."""
    stream, clock = io.StringIO(), Clock()
    progress = table(12, stream, clock)
    progress.row(row(0))
    progress.phase("saving")
    clock.now += 100
    progress.row(row(1))
    assert stream.getvalue().splitlines()[-1].endswith("    15 s")


def test_the_speed_is_that_of_the_steps_own_phases() -> None:
    """3,000 tokens in phases of 1.5 s, though 30 s lie between the lines."""
    stream, clock = io.StringIO(), Clock()
    progress = table(12, stream, clock)
    progress.row(row(0))
    clock.now += 30
    progress.row(row(1))
    assert stream.getvalue().splitlines()[-1].split("|")[4].strip() == "2,000"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (4.51, "4.5 s"), (45.2, "45 s"), (187, "3:07 min"), (7500, "2:05 h")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
