"""Many at a time, out in the order in which they came in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 1000
"""Results that may wait for an earlier one: a call that gets no answer holds up its own problem for hours."""
_POLL_SECONDS = 0.2


def in_order(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    threads: int,
    ahead: int = _AHEAD,
    check_going_on: Callable[[], object] = lambda: None,
) -> Iterator[R]:
    """The results of ``work`` in the order of ``items``, of which ``threads`` and ``ahead`` more are taken at most.

    ``check_going_on`` is called now and then, in the caller's thread. What it, ``items`` or ``work`` raises ends all:
    what was not begun is not, what was is waited for.
    """
    source = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="problems")
    under_way: deque[Future[R]] = deque()
    try:
        under_way.extend(pool.submit(work, item) for item in islice(source, threads + ahead))
        while under_way:
            yield _result(under_way.popleft(), check_going_on)
            under_way.extend(pool.submit(work, item) for item in islice(source, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[R], check_going_on: Callable[[], object]) -> R:
    check_going_on()
    while True:
        try:
            return future.result(timeout=_POLL_SECONDS)
        except TimeoutError:
            # One that the work itself raised is not about this wait.
            if future.done():
                raise
            check_going_on()
