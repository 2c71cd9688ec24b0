"""What the processes of a run tell each other about servers that only one of them can start again.

A server is supervised by a process of its own host. Another process that loses it asks here for a new one, and a
supervisor that has given up says so here: nobody then waits for a server that never comes.
"""

from __future__ import annotations

from torch.distributed import Store  # type: ignore[attr-defined]  # offered, not in __all__

from prism_megatron.errors import RolloutError

_GIVEN_UP = "given up"


class Board:
    """Over a store that all ranks share. Threads may use it beside each other; no call waits for another process."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def ask_to_replace(self, url: str) -> None:
        """Have the supervisor of the server at ``url`` end and restart it. Raises RolloutError without a store."""
        self._add(url, 1)

    def times_asked(self, url: str) -> int:
        """How often that has been asked since the run began. Raises RolloutError without a store."""
        return self._add(url, 0)

    def give_up(self, problem: str) -> None:
        """Say that servers of one host are started no more, and why. Raises RolloutError without a store."""
        try:
            self._store.set(_GIVEN_UP, problem)
        except RuntimeError as error:
            raise _unreachable(error) from error

    def problem(self) -> str | None:
        """What a supervisor said that has given up; None while all watch. Raises RolloutError without a store."""
        try:
            return self._store.get(_GIVEN_UP).decode() if self._store.check([_GIVEN_UP]) else None
        except RuntimeError as error:
            raise _unreachable(error) from error

    def _add(self, url: str, count: int) -> int:
        try:
            return int(self._store.add(f"asked for {url}", count))
        except RuntimeError as error:
            raise _unreachable(error) from error


def _unreachable(error: RuntimeError) -> RolloutError:
    return RolloutError(f"the store through which ranks speak of servers does not answer: {error}")
