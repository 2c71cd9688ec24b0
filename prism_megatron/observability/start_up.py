"""Where the time goes between a command and its first row.

Marks are kept in the environment, so that they pass from the command to the ranks that it starts. Imports no torch.
"""

from __future__ import annotations

import itertools
import json
import os
import time

import psutil

_MARKS = "PRISM_START_UP"


def begin() -> None:
    """The command's start, which is when this process was made, not when Python got here."""
    os.environ[_MARKS] = json.dumps([["", psutil.Process().create_time()]])


def mark(phase: str) -> None:
    """A phase ends now: it began where the one before it ended. Nothing where no command has begun."""
    if _MARKS in os.environ:
        os.environ[_MARKS] = json.dumps([*_marks(), [phase, time.time()]])


def phases() -> dict[str, float]:
    """Seconds of each phase so far, in order; of two with one name the sum."""
    seconds: dict[str, float] = {}
    for (_, start), (phase, end) in itertools.pairwise(_marks()):
        seconds[phase] = seconds.get(phase, 0.0) + end - start
    return seconds


def told() -> str:
    """One line: the seconds in all, and those of each phase."""
    seconds = phases()
    parts = ", ".join(f"{phase} {spent:.1f}" for phase, spent in seconds.items())
    return f"{sum(seconds.values()):.1f} s from the command to the first row: {parts}"


def _marks() -> list[tuple[str, float]]:
    return [(str(phase), float(at)) for phase, at in json.loads(os.environ.get(_MARKS, "[]"))]
