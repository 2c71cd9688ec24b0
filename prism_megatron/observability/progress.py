"""What the user sees while a run goes on: a line per start-up phase, then a table with one line per step."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from prism_megatron.observability.metrics import Row
from prism_megatron.observability.summary import number, step_seconds, trained_tokens

_HEADER_EVERY = 20
_STEPS_REMEMBERED = 10


@dataclass(frozen=True)
class Columns:
    """What a stage's table shows of each step, between the step's number and the speed.

    ``groups`` and ``heads`` are the two lines of its head, as wide as what ``cells`` makes of a row.
    Example: ``Columns("        ", "    loss", lambda row: f"{row['loss']:8.4f}")``.
    """

    groups: str
    heads: str
    cells: Callable[[Row], str]


class Lines(Protocol):
    """Where lines go: a stream, or whatever can be written to like one."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...


class Progress:
    """Plain lines, each flushed, the same in a terminal, a pipe and a log file. For the main rank."""

    def __init__(self, *, stream: Lines | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """The table waits for :meth:`begin_table`."""
        self._stream: Lines = sys.stdout if stream is None else stream
        self._clock = clock
        self._start = clock()
        self._last_row_at: float | None = None
        self._durations: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._num_rows = 0
        self._total_steps: int | None = None
        self._columns = Columns("", "", lambda _row: "")

    def begin_table(self, columns: Columns, *, total_steps: int | None) -> None:
        """What rows show; ``total_steps`` counts from step 0, also in a run that goes on from a later one.

        None where nobody knows how many there will be.
        """
        self._columns = columns
        self._total_steps = total_steps

    def phase(self, text: str) -> None:
        """Say what begins now, with the seconds since this object was made."""
        self._print(f"{self._clock() - self._start:7.1f} s  {text}")
        self._last_row_at = None  # what follows is no part of a step's duration

    def row(self, row: Row) -> None:
        """One step of the table; the header comes first and again every 20 rows."""
        if self._num_rows % _HEADER_EVERY == 0:
            self._print(f"{'':8} | {self._columns.groups} | {'':8} |")
            self._print(f"{'step':>8} | {self._columns.heads} | tokens/s | time left")
        self._num_rows += 1
        now = self._clock()
        seconds = step_seconds(row)
        duration = now - self._last_row_at if self._last_row_at is not None else seconds
        if duration is not None:
            self._durations.append(duration)
        self._last_row_at = now
        step = int(number(row, "step") or 0)
        tokens = trained_tokens(row)
        speed = tokens / seconds if tokens is not None and seconds else None
        place = str(step + 1) if self._total_steps is None else f"{step + 1}/{self._total_steps}"
        self._print(
            f"{place:>8} | "
            f"{self._columns.cells(row)} | "
            f"{'-' if speed is None else f'{speed:,.0f}':>8} | {self._time_left(step):>9}"
        )

    def _time_left(self, step: int) -> str:
        if not self._durations or self._total_steps is None:
            return "-"
        # The median: a step that also saved a checkpoint must not double the estimate.
        return format_seconds(statistics.median(self._durations) * (self._total_steps - step - 1))

    def _print(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()


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
