"""What a run is at just now, and a line about it where nothing else was printed for a while.

Those who work have an ``Activity`` as an attribute, by default one that nobody watches, and say what they count::

    with self.activity.task("answers", total=64) as advance:
        for answer in ...:
            advance(1)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from prism_megatron.observability.progress import format_seconds

QUIET_SECONDS = 10.0
_POLL_SECONDS = 1.0

Advance = Callable[[int], None]


@dataclass(eq=False)
class _Task:
    unit: str
    total: int
    thread: int
    since: float
    done: int = 0


class Activity:
    """The phase that goes on, and how much of what is counted in it is done. Of the thread that made it; others may
    count too, as those do that sample ahead: their tasks are shown where that thread has none."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.step: int | None = None
        """number of the step that is played, from 1; None outside the steps"""
        self._clock = clock
        self._lock = threading.Lock()
        self._thread = threading.get_ident()
        self._phases: list[str] = []
        self._since = clock()
        self._tasks: list[_Task] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what the body does; for the thread that made this object."""
        self._phases.append(name)
        self._since = self._clock()
        try:
            yield
        finally:
            self._phases.pop()
            self._since = self._clock()

    @contextmanager
    def task(self, unit: str, *, total: int) -> Iterator[Advance]:
        """Count what the body does, in ``unit``: it is given a function that any thread may tell what was done."""
        task = _Task(unit, total, threading.get_ident(), self._clock())

        def advance(count: int) -> None:
            with self._lock:
                task.done += count

        with self._lock:
            self._tasks.append(task)
        try:
            yield advance
        finally:
            with self._lock:
                self._tasks.remove(task)

    def text(self) -> str:
        """One line, such as ``step 12: rollout, 45 of 64 answers, 12 s, about 5 s left``."""
        now = self._clock()
        with self._lock:
            tasks = [task for task in self._tasks if task.thread == self._thread] or self._tasks[:1]
            counts = [f"{task.done} of {task.total} {task.unit}" for task in tasks]
            left = _seconds_left(tasks[0], now) if tasks else None
        (phase,) = self._phases[-1:] or ["going on"]  # one look: the other thread may leave the phase meanwhile
        parts = [phase.replace("_", " "), *counts, _whole(now - self._since)]
        if left is not None:
            parts.append(f"about {_whole(max(1.0, left))} left")
        return ("" if self.step is None else f"step {self.step}: ") + ", ".join(parts)


def _seconds_left(task: _Task, now: float) -> float | None:
    if not 0 < task.done < task.total or now == task.since:
        return None
    return (now - task.since) * (task.total - task.done) / task.done


def _whole(seconds: float) -> str:
    """Without tenths, which would only flicker."""
    return f"{seconds:.0f} s" if seconds < 59.5 else format_seconds(seconds)


@runtime_checkable
class Watched(Protocol):
    """What tells an activity what it is at."""

    activity: Activity


class Heartbeat:
    """A thread that prints a line about an activity where none was printed for a while; it never outlives ``close``."""

    def __init__(
        self,
        activity: Activity,
        *,
        say: Callable[[str], None],
        seconds_silent: Callable[[], float],
        quiet_seconds: float = QUIET_SECONDS,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        """``seconds_silent()`` is the time since anything was printed, by anybody."""
        self._activity, self._say, self._seconds_silent = activity, say, seconds_silent
        self._quiet, self._poll = quiet_seconds, poll_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. May be called again."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(self._poll):
            try:
                if self._seconds_silent() >= self._quiet:
                    self._say(self._activity.text())
            except Exception:  # noqa: BLE001  # a line about the run must not be what disturbs it
                return
