"""How long work takes on a machine that does other work as well."""

from __future__ import annotations

import time
from collections.abc import Callable

TRIES = 5


def processor_seconds(work: Callable[[], object], *, enough: float, tries: int = TRIES) -> float:
    """The least processor time of a few tries; once ``enough`` is reached no other is made.

    One try alone can take ten times as long: a garbage collection falls into it, or the core is shared.
    """
    least = float("inf")
    for _ in range(tries):
        began = time.process_time()
        work()
        least = min(least, time.process_time() - began)
        if least < enough:
            break
    return least
