"""Ending a run because somebody asked: a signal is a wish, which all ranks grant together after a whole step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 1.0
"""torchrun passes a Ctrl-C on that the terminal has sent its ranks already: twice within this time is once."""


class Stopping:
    """Whether the run is to end. Use it as a context manager: inside, signals are wishes; a second one ends at once."""

    def __init__(self, max_minutes: float | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """``max_minutes`` count from when this process began; ``clock`` gives seconds since 1970."""
        self._clock = clock
        self._deadline = None if max_minutes is None else _began() + 60.0 * max_minutes
        self._max_minutes = max_minutes
        self._asked: tuple[signal.Signals, float] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # A launcher that answers Ctrl-C for its ranks has them ignore it.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def wish(self) -> str | None:
        """Why this rank would end the run now."""
        if self._asked is not None:
            return self._asked[0].name
        if self._deadline is not None and self._clock() >= self._deadline:
            return f"--max-minutes {self._max_minutes:g}"
        return None

    def agreed(self) -> str | None:
        """Why the run ends now, on all ranks alike; None where no rank wishes it. All ranks call it together."""
        from prism_megatron.parallel.collectives import all_gather_objects  # torch, which commands of one process lack

        return next((wish for wish in all_gather_objects(self.wish) if wish is not None), None)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        now = self._clock()
        if self._asked is None:
            self._asked = signal.Signals(number), now
        elif now - self._asked[1] >= _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _began() -> float:
    return float(psutil.Process().create_time())
