"""Which server takes the next request."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from prism_megatron.rollout.sglang.http import ServerClient


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
        self._entry.pause = self.client.patience.first_pause

    def failed(self) -> None:
        """Leave the server alone for a while, each time for longer."""
        self._entry.not_before = time.monotonic() + self._entry.pause
        self._entry.pause = min(2 * self._entry.pause, self.client.patience.longest_pause)


@dataclass(eq=False)
class _Entry:
    client: ServerClient
    pause: float
    samples: int = 0
    not_before: float = 0.0


class Pool:
    """Which server takes the next request: of those that did not just fail, the one with the fewest samples to draw."""

    def __init__(self, clients: Sequence[ServerClient]) -> None:
        self._entries = [_Entry(client, client.patience.first_pause) for client in clients]
        self._lock = threading.Lock()

    def least_loaded(self, samples: int, deadline: float) -> Place:
        """A place for ``samples`` more samples; waits while every server has just failed, never past ``deadline``."""
        while True:
            now = time.monotonic()
            with self._lock:
                open_ = [entry for entry in self._entries if entry.not_before <= now or now >= deadline]
                if open_:
                    entry = min(open_, key=lambda entry: entry.samples)
                    entry.samples += samples
                    return Place(self, entry, samples)
                earliest = min(entry.not_before for entry in self._entries)
            time.sleep(min(earliest, deadline) - now)

    def is_busy(self) -> bool:
        """Whether a place is taken."""
        with self._lock:
            return any(entry.samples for entry in self._entries)

    def leave(self, entry: _Entry, samples: int) -> None:
        """Give a place back."""
        with self._lock:
            entry.samples -= samples
