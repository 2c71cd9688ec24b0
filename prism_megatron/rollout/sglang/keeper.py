"""Who starts a lost server again, seen from one process of a run; and which servers are left out meanwhile.

A server is this process's own, or was started by another process of the run (``Board``), or runs already and is
attached (``--rollout-urls``): nobody here starts that one again, but it may come back. A server of somebody else's that
is lost in an update is left out until it has been given the weights in use (``Returns``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from prism_megatron.errors import RolloutError
from prism_megatron.rollout.sglang.board import Board


class Supervisor(Protocol):
    """Of this process's own servers."""

    @property
    def urls(self) -> tuple[str, ...]: ...

    def supervises(self, url: str) -> bool:
        """Whether the server at ``url`` is started again when it dies. Raises RolloutError if that has failed."""

    def replace(self, url: str) -> bool:
        """Have the lost server at ``url`` started again; False if nobody here does. Raises as ``supervises``."""


class Keeper:
    """Threads may share it."""

    def __init__(
        self,
        urls: Sequence[str],
        own: Supervisor | None,
        board: Board | None,
        *,
        return_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``urls`` are those of all servers. With a ``board``, those that are not ``own`` are supervised by others.

        Once no attached server has answered for ``return_seconds``, the wait for them is over. ``clock`` is in seconds.
        """
        self._urls = tuple(urls)
        self._own = own
        self._board = board
        self._return_seconds = return_seconds
        self._clock = clock
        self._out: set[str] = set()
        self._silent: dict[str, float] = {}  # attached servers that last did not answer, and since when
        self._lock = threading.Lock()
        self.num_admitted = 0
        """how often a server was let in again"""

    @property
    def foreign(self) -> tuple[str, ...]:
        """Servers that this process does not supervise."""
        return tuple(url for url in self._urls if not self._is_own(url))

    def is_attached(self, url: str) -> bool:
        """Whether the server was there before the run, which starts none like it."""
        return self._board is None and url in self.foreign

    def is_out(self, url: str) -> bool:
        """Whether the server takes no part in updates, because it lacks the weights in use."""
        with self._lock:
            return url in self._out

    def out(self) -> frozenset[str]:
        """All servers that are left out."""
        with self._lock:
            return frozenset(self._out)

    def follow(self, out: Collection[str]) -> None:
        """Take note of which servers another process, which hands weights over, leaves out."""
        with self._lock:
            self._out = set(out)

    def comes_back(self, url: str) -> bool:
        """Whether it is worth waiting for the server at ``url``, which was just lost.

        False for an address that is no server of the run's, such as a router's. Raises RolloutError where a supervisor
        has given up, or where all attached servers have been silent for too long.
        """
        if url not in self._urls:
            return False
        if self._own is not None and self._is_own(url):
            return self._own.supervises(url)
        if self._board is None:
            self._note_silence(url)
        elif (problem := self._board.problem()) is not None:
            raise RolloutError(problem)
        return True

    def answered(self, url: str) -> None:
        """Take note that the server is there."""
        with self._lock:
            self._silent.pop(url, None)

    def replace(self, url: str) -> bool:
        """See that the server, lost in an update, gets the weights in use when it or its successor is there again.

        Returns whether it may be left out until then. Raises as ``comes_back``.
        """
        if self._own is not None and self._is_own(url):
            return self._own.replace(url)
        if not self.comes_back(url):
            return False
        if self._board is not None:
            self._board.ask_to_replace(url)
        with self._lock:
            self._out.add(url)
        return True

    def admit(self, url: str) -> None:
        """Let the server, which has the weights in use, take part again."""
        with self._lock:
            self._out.discard(url)
            self._silent.pop(url, None)
            self.num_admitted += 1

    def _is_own(self, url: str) -> bool:
        return self._own is not None and url in self._own.urls

    def _note_silence(self, url: str) -> None:
        with self._lock:
            since = self._silent.setdefault(url, self._clock())
            all_silent = len(self._silent) == len(self._urls)
            latest = max(self._silent.values(), default=since)
        if all_silent and self._clock() - latest >= self._return_seconds:
            raise RolloutError(
                f"no server of --rollout-urls ({', '.join(self._urls)}) has answered for {self._return_seconds:.0f} s; "
                "start them again, or raise --rollout-return-minutes"
            )
