"""Where the time goes: wall seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prism_megatron.observability.activity import Activity


class PhaseTimers:
    """Adds up the seconds spent in named phases. Phases must not be nested, or their seconds count twice.

    Example::

        with timers.phase("rollout"):
            groups = sample(...)
        row |= {f"seconds/{phase}": seconds for phase, seconds in timers.take().items()}
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, activity: Activity | None = None) -> None:
        """``activity`` is told which phase goes on."""
        self._clock = clock
        self._activity = activity or Activity()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the body, also when it raises."""
        start = self._clock()
        try:
            with self._activity.phase(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last ``take``, in the order in which phases were first entered."""
        taken, self._seconds = self._seconds, {}
        return taken
