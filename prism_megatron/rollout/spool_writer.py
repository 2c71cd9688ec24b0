"""One process's part of the spooled weights, written by a thread of its own while the process goes on.

Tensors that wait for the disk stay in the host's memory: at most this process's share of the weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.weight_spool import Spool, join_parts, remove_older, spool_folder

_POLL_SECONDS = 0.02
_PARTS_SECONDS = 600.0


class SpoolWriter:
    """Writes one version after the other: ``begin``, ``add`` …, ``finish``; nothing waits but the next ``begin``."""

    def __init__(self, root: Path, *, like: Path, parts_seconds: float = _PARTS_SECONDS) -> None:
        """Folders are made in ``root``, with the companion files of ``like``.

        ``join`` gives up on parts that others have not written after ``parts_seconds``.
        """
        self._root = root
        self._like = like
        self._parts_seconds = parts_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights to disk")
        self._under_way: list[Future[None]] = []
        self._stopping = threading.Event()
        self._spool: Spool | None = None
        self._newest: Path | None = None
        self.num_bytes = 0
        """of all tensors that were given to be written"""

    def begin(self, number: int, part: int, *, left_out: AbstractSet[str]) -> None:
        """Begin this process's ``part`` of version ``number``'s folder, with the weights ``left_out`` as they were.

        Raises WeightSyncError where the version before could not be written, or there is none to take weights from.
        """
        self.wait()
        if left_out and self._newest is None:
            raise WeightSyncError(f"{len(left_out)} weights are left out that were never written; send all first")
        self._spool = Spool(spool_folder(self._root, number), like=self._like, part=part)
        if left_out and self._newest is not None:
            self._submit(partial(self._spool.carry_over, self._newest, left_out))

    def add(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Have tensors written. They must not change any more."""
        assert self._spool is not None
        here = [(name, tensor.detach().cpu()) for name, tensor in tensors]
        self.num_bytes += sum(tensor.nbytes for _, tensor in here)
        self._submit(partial(self._spool.add, here))

    def finish(self) -> None:
        """All of this part has been added."""
        assert self._spool is not None
        self._submit(self._spool.finish)
        self._newest = self._spool.folder

    def join(self, number: int, parts: Sequence[int]) -> Future[None]:
        """Have the folder made whole once all ``parts`` of it are there, and older ones removed."""
        return self._submit(partial(self._join, spool_folder(self._root, number), tuple(parts)))

    def problem(self) -> str | None:
        """What went wrong with anything that has been written so far."""
        errors = (future.exception() for future in self._under_way if future.done())
        return next((str(error) for error in errors if error is not None), None)

    def wait(self) -> None:
        """Until all is written. Raises WeightSyncError where it cannot be."""
        waiting, self._under_way = self._under_way, []
        for future in waiting:
            future.result()

    def close(self) -> None:
        """End the thread; what is not yet written will not be."""
        self._stopping.set()
        self._thread.shutdown()

    def _submit(self, call: Callable[[], None]) -> Future[None]:
        def unless_closed() -> None:
            if self._stopping.is_set():
                raise WeightSyncError(f"the weights in {self._root} are not written any more: the engine was closed")
            call()

        self._under_way = [one for one in self._under_way if not one.done() or one.exception() is not None]
        self._under_way.append(self._thread.submit(unless_closed))
        return self._under_way[-1]

    def _join(self, folder: Path, parts: Sequence[int]) -> None:
        deadline = time.monotonic() + self._parts_seconds
        while not join_parts(folder, parts, like=self._like):
            if self._stopping.wait(_POLL_SECONDS) or time.monotonic() > deadline:
                raise WeightSyncError(
                    f"{folder} did not become whole in {self._parts_seconds:.0f} s: another rank has not written its "
                    "part; do all hosts see this folder?"
                )
        remove_older(folder)
