"""What the user sees while a run goes on: a line per start-up phase, then a table with one line per step."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from prism_megatron.observability.metrics import Row
from prism_megatron.observability.summary import number, step_seconds

_HEADER_EVERY = 20
_STEPS_REMEMBERED = 10
_GROUPS = "         |     reward gap      | discriminator right |       |          |"
_HEADER = "    step | perception  reason. | perception  reason. | valid | tokens/s | time left"


class Progress:
    """Plain lines, each flushed, the same in a terminal, a pipe and a log file. For the main rank."""

    def __init__(
        self, *, total_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``total_steps`` counts from step 0, also in a run that goes on from a later one."""
        self._total_steps = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._start = clock()
        self._last_row_at: float | None = None
        self._durations: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._num_rows = 0

    def phase(self, text: str) -> None:
        """Say what begins now, with the seconds since this object was made."""
        self._print(f"{self._clock() - self._start:7.1f} s  {text}")
        self._last_row_at = None  # what follows is no part of a step's duration

    def row(self, row: Row) -> None:
        """One step of the table; the header comes first and again every 20 rows."""
        if self._num_rows % _HEADER_EVERY == 0:
            self._print(_GROUPS)
            self._print(_HEADER)
        self._num_rows += 1
        now = self._clock()
        seconds = step_seconds(row)
        duration = now - self._last_row_at if self._last_row_at is not None else seconds
        if duration is not None:
            self._durations.append(duration)
        self._last_row_at = now
        step = int(number(row, "step") or 0)
        tokens = number(row, "response_tokens")
        speed = tokens / seconds if tokens is not None and seconds else None
        self._print(
            f"{f'{step + 1}/{self._total_steps}':>8} | "
            f"{_signed(row, 'perception'):>10}  {_signed(row, 'reasoning'):>7} | "
            f"{_share(row, 'perception/accuracy'):>10}  {_share(row, 'reasoning/accuracy'):>7} | "
            f"{_share(row, 'valid_share'):>5} | "
            f"{'-' if speed is None else f'{speed:,.0f}':>8} | {self._time_left(step):>9}"
        )

    def _time_left(self, step: int) -> str:
        if not self._durations:
            return "-"
        # The median: a step that also saved a checkpoint must not double the estimate.
        return format_seconds(statistics.median(self._durations) * (self._total_steps - step - 1))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def format_seconds(seconds: float) -> str:
    """``4.5 s``, ``45 s``, ``3:07 min`` or ``2:05 h``."""
    whole = round(seconds)
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _signed(row: Row, tower: str) -> str:
    value = number(row, f"{tower}/reward_gap")
    return "-" if value is None else f"{value:+.2f}"


def _share(row: Row, key: str) -> str:
    value = number(row, key)
    return "-" if value is None else f"{value:.2f}"
