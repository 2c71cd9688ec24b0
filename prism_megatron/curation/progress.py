"""Lines about a step while it goes on: how far, how fast, at what cost, and for how long still."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator

from prism_megatron.config.tools.curate import Step
from prism_megatron.curation.asking import Spent
from prism_megatron.curation.files import Row
from prism_megatron.observability.progress import format_seconds

_REMEMBERED = 30
"""Lines over which a rate is taken: answers from the store come first, and fast."""


class Progress:
    """Tells ``say`` about rows as they pass. For one thread."""

    def __init__(
        self,
        *,
        say: Callable[[str], object],
        spent: Spent,
        every_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock`` gives seconds."""
        self._say, self._spent, self._every, self._clock = say, spent, every_seconds, clock

    def watched(self, step: Step, rows: Iterator[Row], total: int | None) -> Generator[Row]:
        """The same rows. ``total`` is how many there will be, None where nobody knows."""
        began = said = self._clock()
        passed: deque[tuple[float, int]] = deque([(began, 0)], maxlen=_REMEMBERED)
        done = kept = 0
        fallen: Counter[str] = Counter()
        for row in rows:
            yield row
            done += 1
            kept += row.kept
            if not row.kept:
                fallen[row.reason] += 1
            now = self._clock()
            if now - said >= self._every:
                said = now
                self._say(f"{step}: {self._line(done, total, passed, now)}")
                passed.append((now, done))
        seconds = self._clock() - began
        why = "".join(f", {count} {reason}" for reason, count in fallen.most_common())
        self._say(
            f"{step}: {kept} of {done} kept in {format_seconds(seconds)} ({done / max(seconds, 1e-9):,.1f}/s){why}"
            f"{self._cost}"
        )

    def _line(self, done: int, total: int | None, passed: deque[tuple[float, int]], now: float) -> str:
        since, before = passed[0]
        rate = (done - before) / max(now - since, 1e-9)
        place = f"{done}" if total is None else f"{done} of {total}"
        left = "" if total is None or not rate else f", {format_seconds((total - done) / rate)} left"
        return f"{place}, {rate:,.1f}/s{left}{self._cost}"

    @property
    def _cost(self) -> str:
        return f"; answers: {self._spent.calls:,}, cost {self._spent.cost:.4f}" if self._spent.calls else ""
