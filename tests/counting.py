"""An activity that remembers what was counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prism_megatron.observability.activity import Activity, Advance


class Counting(Activity):
    """``counted`` are unit, total and what was done of every task that is over."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.counted: list[tuple[str, int, int]] = []
        self._own = threading.Lock()

    @contextmanager
    def task(self, unit: str, *, total: int) -> Iterator[Advance]:
        done = 0

        def count(more: int) -> None:
            nonlocal done
            with self._own:
                done += more

        with super().task(unit, total=total):
            yield count
        self.counted.append((unit, total, done))
