"""What one of several processes decides for all of them, before they are a world."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from prism_megatron.engine.launch import die_with_torchrun
from prism_megatron.errors import LostRankError, PrismError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_ANSWER, _HEARD = "prism_megatron/answer", "prism_megatron/heard"
_POLL_SECONDS = 0.2
_GOODBYE_SECONDS = 10.0
"""How long rank 0 keeps the store for ranks that have met it and have not read its answer yet."""


class FirstRank:
    """Rank 0, which decides for all processes that were started with it, by torchrun or whatever else sets WORLD_SIZE.

    They meet in the store of their rendezvous (MASTER_ADDR, MASTER_PORT), which the first decision opens. Where
    torchrun does not serve it, rank 0 does; the process groups of the world join the same one, so this is to be left
    only after them::

        with FirstRank() as first:
            setting = first.decides(lambda: "what takes minutes to find out")
            launch(...)
    """

    def __init__(self) -> None:
        self._rank = int(os.environ.get("RANK", "0"))
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Store | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Rank 0, where it serves the store and has decided, stays until everyone has heard."""
        if self._store is None or self._rank or kind is not None or _agent_serves():
            return
        deadline = time.monotonic() + _GOODBYE_SECONDS
        while self._store.add(_HEARD, 0) < self._world_size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def decides(self, decide: Callable[[], str]) -> str:
        """What ``decide`` returns on rank 0, on every rank; it is called nowhere else, and once in a run.

        Raises what ``decide`` raises; on other ranks PrismError, with the words and the status of rank 0's, and
        LostRankError where rank 0 is gone.
        """
        if self._world_size == 1:
            return decide()
        assert self._store is None, "ranks would read the first answer again"
        die_with_torchrun()
        self._store = _rendezvous()
        return self._hear(self._store) if self._rank else _tell(self._store, decide)

    def _hear(self, store: Store) -> str:
        from torch.distributed import DistError

        try:
            # Asked again and again, and not waited for: rank 0 may take longer than any limit, and a wait inside torch
            # hears no Ctrl-C.
            while not store.check([_ANSWER]):
                time.sleep(_POLL_SECONDS)
            answer = json.loads(store.get(_ANSWER))
            store.add(_HEARD, 1)
        except DistError as error:
            said = "rank 0 ended before it said how the run begins; its own output says why"
            raise LostRankError(said, speaker=self._rank) from error
        if "error" in answer:
            raise _RefusedError(answer["error"], answer["status"])
        return str(answer["decided"])


class _RefusedError(PrismError):
    """Rank 0 has refused the run."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _tell(store: Store, decide: Callable[[], str]) -> str:
    answer: dict[str, object] = {"error": "rank 0 failed before the run began; its own output says why", "status": 1}
    try:
        decided = decide()
        answer = {"decided": decided}
    except PrismError as error:
        answer = {"error": str(error), "status": error.status}
        raise
    finally:
        store.set(_ANSWER, json.dumps(answer))
    return decided


def _agent_serves() -> bool:
    """Whether the store is torchrun's, and outlives this process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _rendezvous() -> Store:
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store
