"""An event loop in a thread of its own, for threads that wait for what happens in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class LoopThread:
    """Runs coroutines from its making until it is closed. Any thread may start one, but its own may not close it."""

    def __init__(self, name: str) -> None:
        """``name`` is the thread's."""
        self._lock = threading.Lock()
        self._is_closed = False
        self._under_way: set[Future[Any]] = set()
        self._at_end: tuple[Callable[[], Awaitable[None]], ...] = ()
        self._loop, self._ended = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        """Begin ``work``; cancelling the future ends it. Raises RuntimeError once the loop is closed."""
        with self._lock:
            if self._is_closed:
                work.close()
                raise RuntimeError(f"{self._thread.name} is closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._under_way.add(future)
        # Outside of the lock: where the work has ended already, this runs at once.
        future.add_done_callback(self._forget)
        return future

    def close(self, *at_end: Callable[[], Awaitable[None]]) -> None:
        """Cancel what is under way, run ``at_end`` in the loop one after the other, and end the thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._at_end = at_end
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._under_way.discard(future)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        await self._ended.wait()
        # What was begun here is cancelled, and tasks that it has begun itself are its own to end.
        with self._lock:
            begun = tuple(self._under_way)
        for future in begun:
            future.cancel()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
        for last in self._at_end:
            await last()
