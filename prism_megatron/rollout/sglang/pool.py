"""Which server takes the next request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Self

from prism_megatron.rollout.sglang.http import ServerClient


def _none(_url: str) -> bool:
    """No server is out."""
    return False


class Place:
    """One request's place on the server that had the least to do."""

    def __init__(self, pool: Pool, entry: _Entry, samples: int) -> None:
        self.client = entry.client
        self._pool = pool
        self._entry = entry
        self._samples = samples

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.leave(self._entry, self._samples)

    def worked(self) -> None:
        """The server answered well: its next failure is its first."""
        self._entry.has_failed = False
        self._entry.not_before = 0.0
        self._entry.pause = self.client.patience.first_pause

    def failed(self) -> None:
        """Leave the server alone for a while, each time for longer."""
        self._entry.has_failed = True
        self._entry.not_before = time.monotonic() + self._entry.pause
        self._entry.pause = min(2 * self._entry.pause, self.client.patience.longest_pause)


@dataclass(eq=False)
class _Entry:
    client: ServerClient
    pause: float
    is_near: bool
    samples: int = 0
    not_before: float = 0.0
    has_failed: bool = False
    """last time it was asked"""


class Pool:
    """Which server takes the next request: of those that did not just fail, the one with the fewest samples to draw.

    Servers that are near come before all others, and those that are out after them. After a failure one request at a
    time finds out whether a server is there again: where a host is gone each attempt takes seconds.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        near: Collection[str] = (),
        is_out: Callable[[str], bool] = _none,
    ) -> None:
        """``near`` and ``is_out`` speak of addresses of ``clients``."""
        self._is_out = is_out
        self._entries = [_Entry(client, client.patience.first_pause, client.url in near) for client in clients]
        self._lock = threading.Lock()

    def least_loaded(self, samples: int, deadline: float) -> Place:
        """A place for ``samples`` more samples; waits while every server has just failed, never past ``deadline``."""
        while True:
            now = time.monotonic()
            with self._lock:
                open_ = [entry for entry in self._entries if entry.not_before <= now or now >= deadline]
                if open_:
                    entry = min(open_, key=self._rank)
                    entry.samples += samples
                    if entry.has_failed:
                        entry.not_before = now + entry.pause
                    return Place(self, entry, samples)
                earliest = min(entry.not_before for entry in self._entries)
            time.sleep(min(earliest, deadline) - now)

    def _rank(self, entry: _Entry) -> tuple[bool, bool, int]:
        return self._is_out(entry.client.url), not entry.is_near, entry.samples

    def is_busy(self) -> bool:
        """Whether a place is taken."""
        with self._lock:
            return any(entry.samples for entry in self._entries)

    def leave(self, entry: _Entry, samples: int) -> None:
        """Give a place back."""
        with self._lock:
            entry.samples -= samples
