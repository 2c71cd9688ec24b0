"""Groups that block as NCCL's do, between processes or threads that have gloo's alone.

NCCL makes a communicator inside a group's first collective, and that call, asynchronous or not, returns on no member
before all of them are in theirs. gloo connects when a group is made, so its first collective returns at once: an order
of calls that can never end with NCCL passes every test with gloo.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

PATIENCE_SECONDS = 20.0


class Meetings:
    """Where the other members of groups say that they are in their first collective. By the group's name."""

    def __init__(self, seconds: float = PATIENCE_SECONDS) -> None:
        """A member waits ``seconds`` for the others, and not for ever as NCCL would."""
        self._seconds = seconds
        self._came: defaultdict[str, threading.Event] = defaultdict(threading.Event)

    def arrive(self, name: str) -> None:
        """The others are in their first collective."""
        self._came[name].set()

    def wait(self, name: str) -> None:
        """Return once they are. Raises RuntimeError, as torch does, where they do not come."""
        if not self._came[name].wait(self._seconds):
            raise RuntimeError(f"the first collective of {name} waits for members that never come to it")


class LazyGroup:
    """A gloo group whose broadcasts wait, in the call, for the others to be in theirs."""

    def __init__(self, group: Any, name: str, meetings: Meetings) -> None:
        self._group, self._name, self._meetings = group, name, meetings
        self.aborted = False

    def broadcast(self, tensors: list[Any], options: Any) -> Any:
        """As of the group."""
        self._meetings.wait(self._name)
        return self._group.broadcast(tensors, options)

    def abort(self) -> None:
        """As of the group."""
        self.aborted = True
        self._group.abort()
