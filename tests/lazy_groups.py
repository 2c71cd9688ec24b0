"""Groups that block as NCCL's do, between processes or threads that have gloo's alone.

NCCL makes a communicator inside a group's first collective, and that call, asynchronous or not, returns on no member
before all of them are in theirs. gloo connects when a group is made, so its first collective returns at once: an order
of calls that can never end with NCCL passes every test with gloo.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

PATIENCE_SECONDS = 20.0
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "_all_gather_base", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base",
    "scatter",
)  # fmt: skip
"""Each takes its group as ``group``, the default one where that is None."""


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


class FirstCollectives:
    """Torch's own collectives, of which a group's first waits for all of its members.

    ``batch_isend_irecv`` counts as a collective of its group, as NCCL's documentation has it; a lone ``send`` or
    ``recv`` waits for its pair.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self.used: dict[str, list[int]] = {}
        """ranks of each group that was used, by its name"""
        self._store, self._limit = store, timedelta(seconds=seconds)
        self._in_batch = False

    def collective(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def lazily(*args: Any, **kwargs: Any) -> Any:
            passed = (*args, kwargs.get("group"))
            group = next((one for one in passed if isinstance(one, dist.ProcessGroup)), dist.group.WORLD)
            self._meet_group(group)
            return call(*args, **kwargs)

        return lazily

    def batched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def lazily(operations: Sequence[Any]) -> Any:
            self._meet_group(operations[0].group or dist.group.WORLD)
            self._in_batch = True
            try:
                return call(operations)
            finally:
                self._in_batch = False

        return lazily

    def lone(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def lazily(*args: Any, **kwargs: Any) -> Any:
            if not self._in_batch:
                other = args[1] if len(args) > 1 else kwargs.get("dst", kwargs.get("src"))
                group: Any = (args[2] if len(args) > 2 else kwargs.get("group")) or dist.group.WORLD
                pair = sorted((dist.get_rank(), int(other)))  # type: ignore[arg-type]  # one of them is there
                self._meet(f"{group.group_name}, {pair[0]} and {pair[1]}", pair)
            return call(*args, **kwargs)

        return lazily

    def _meet_group(self, group: Any) -> None:
        self._meet(group.group_name, dist.get_process_group_ranks(group))

    def _meet(self, name: str, ranks: Sequence[int]) -> None:
        if name in self.used:
            return
        self.used[name] = list(ranks)
        self._store.set(f"lazy/{name}/{dist.get_rank()}", "here")
        try:
            self._store.wait([f"lazy/{name}/{rank}" for rank in ranks], self._limit)
        except RuntimeError as error:
            raise RuntimeError(f"the first collective of group {name} of ranks {list(ranks)} waits for ever") from error


@contextmanager
def lazy_collectives(*, seconds: float = 60.0) -> Iterator[dict[str, list[int]]]:
    """Make every group of this process block in its first collective until all of its members are in theirs.

    For ranks of a world, all of which enter it. Gives the ranks of each group that was used, by its name. A member
    waits ``seconds`` for the others, then raises. Blind spot: streams, and all but a group's first collective.
    """
    firsts = FirstCollectives(distributed_c10d._get_default_store(), seconds)
    made = dict.fromkeys(COLLECTIVES, firsts.collective) | {"batch_isend_irecv": firsts.batched}
    made |= dict.fromkeys(("send", "recv", "isend", "irecv"), firsts.lone)
    replaced = {id(old): (old, wrap(old)) for name, wrap in made.items() if (old := getattr(distributed_c10d, name))}
    places: list[tuple[Any, str, Any]] = []
    for module in list(sys.modules.values()):
        # Megatron keeps names of its own for some of them.
        for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else []:
            if id(value) in replaced:
                old, new = replaced[id(value)]
                places.append((module, name, old))
                setattr(module, name, new)
    try:
        yield firsts.used
    finally:
        for module, name, old in places:
            setattr(module, name, old)
