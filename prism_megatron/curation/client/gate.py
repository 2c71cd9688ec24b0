"""What all calls of one process share: news that something may begin, and the reason why nothing begins any more."""

from __future__ import annotations

import asyncio
import math

from prism_megatron.errors import PrismError


class Gate:
    """Belongs to one event loop. Once it is shut it stays so."""

    def __init__(self) -> None:
        """Open."""
        self._reason: PrismError | None = None
        self._listening: set[asyncio.Future[None]] = set()
        self._sleeping: set[asyncio.Future[None]] = set()

    @property
    def is_shut(self) -> bool:
        return self._reason is not None

    def check(self) -> None:
        """Raise the PrismError that it was shut for."""
        if self._reason is not None:
            raise self._reason

    def shut(self, reason: PrismError) -> None:
        """Let nothing begin any more; the first reason stays."""
        if self._reason is None:
            self._reason = reason
        _wake(self._sleeping)
        self.notify()

    def notify(self) -> None:
        """Something has changed that may let a call begin, or end a wait."""
        _wake(self._listening)

    async def changed(self, seconds: float) -> None:
        """Wait for news, for so many seconds at most, which may be infinite. Raises PrismError once it is shut."""
        self.check()
        await _wait(self._listening, seconds)
        self.check()

    async def sleep(self, seconds: float) -> None:
        """Wait. Raises PrismError as soon as it is shut."""
        self.check()
        await _wait(self._sleeping, seconds)
        self.check()

    async def settled(self) -> None:
        """Wait for news of any kind, though it is shut."""
        await _wait(self._listening, math.inf)


def _wake(waiting: set[asyncio.Future[None]]) -> None:
    for one in waiting:
        if not one.done():
            one.set_result(None)


async def _wait(waiting: set[asyncio.Future[None]], seconds: float) -> None:
    news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting.add(news)
    try:
        await asyncio.wait({news}, timeout=None if math.isinf(seconds) else seconds)
    finally:
        waiting.discard(news)
