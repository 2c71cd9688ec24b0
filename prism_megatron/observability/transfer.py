"""How far a copy of many bytes is: bytes, rate and time left, on one line of a terminal or a line every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from prism_megatron.observability.progress import format_seconds

_TERMINAL_SECONDS = 0.2
_LOG_SECONDS = 5.0
_UNITS = ("B", "KB", "MB", "GB", "TB")


class TransferProgress:
    """Counts bytes from any thread and says how many of ``total_bytes`` are done."""

    def __init__(
        self,
        label: str,
        *,
        total_bytes: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total_bytes
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._lock = threading.Lock()
        self._in_terminal = self._stream.isatty()
        self._start = self._last = clock()
        self._done = self._skipped = 0

    def skip(self, num_bytes: int) -> None:
        """Count bytes that an earlier run has done; they tell nothing about the rate."""
        self._done += num_bytes
        self._skipped += num_bytes

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done now."""
        with self._lock:
            self._done += num_bytes
            now = self._clock()
            if now - self._last >= (_TERMINAL_SECONDS if self._in_terminal else _LOG_SECONDS):
                self._last = now
                self._print(self._line(now - self._start))

    def finish(self) -> None:
        """The last line, with the time that all took."""
        seconds = self._clock() - self._start
        moved = self._done - self._skipped
        self._print(f"{self._label}: {format_bytes(moved)} in {format_seconds(seconds)}, {_rate(moved, seconds)}")
        if self._in_terminal:
            self._stream.write("\n")

    def _line(self, seconds: float) -> str:
        moved = self._done - self._skipped
        left = (self._total - self._done) * seconds / moved if moved else 0.0
        share = 100 * self._done // self._total if self._total else 100
        return (
            f"{self._label}: {format_bytes(self._done)} of {format_bytes(self._total)} ({share} %), "
            f"{_rate(moved, seconds)}, {format_seconds(left)} left"
        )

    def _print(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}" if self._in_terminal else f"{line}\n")
        self._stream.flush()


def format_bytes(count: float) -> str:
    """``512 B``, ``1.5 KB`` or ``8.9 GB``: powers of 1000, as disks are sold and ``df -H`` counts."""
    for unit in _UNITS[:-1]:
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {_UNITS[-1]}"


def _rate(num_bytes: int, seconds: float) -> str:
    return f"{format_bytes(num_bytes / seconds if seconds > 0 else 0.0)}/s"
