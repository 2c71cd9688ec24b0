"""How often servers that die are started again before something must be wrong with all of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

PER_HOUR = 12
_HOUR_SECONDS = 3600.0


class Restarts:
    """At most so many in any hour: a run of weeks outlives many single deaths, and none in a row."""

    def __init__(self, per_hour: int = PER_HOUR, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self.per_hour = per_hour
        self._clock = clock
        self._begun: deque[float] = deque()

    def begin(self) -> bool:
        """Whether one more may begin now; it counts if so."""
        now = self._clock()
        while self._begun and now - self._begun[0] >= _HOUR_SECONDS:
            self._begun.popleft()
        if len(self._begun) >= self.per_hour:
            return False
        self._begun.append(now)
        return True
