"""Processes that read records for a rank, or for a tool that indexes them.

Each has a pipe of its own, whose other end no third process holds: one that is ended from outside, in the middle of a
large answer too, is an end of its pipe and never a wait for the rest. (Pools of multiprocessing, concurrent.futures and
torch share a pipe among their workers, and wait for ever then where workers are forked from a server.)
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NamedTuple, TypeVar

from prism_megatron.errors import DataError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

PRELOAD = ("prism_megatron.data.stream.prefetch",)
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 5.0


class _Worker(NamedTuple):
    process: ForkServerProcess
    connection: Connection


class _Failure(NamedTuple):
    """A bug, with its traceback as text."""

    text: str


def in_workers(
    function: Callable[[ItemT], ResultT],
    items: Iterator[ItemT],
    *,
    workers: int,
    ahead: int,
    preload: Sequence[str] = PRELOAD,
) -> Iterator[ResultT]:
    """``function`` of every item, in their order, worked out by so many processes (0: this one).

    It is sent to each of them once. Of every worker ``ahead`` items are out at a time, which is also how many results
    wait. Closing the iterator ends the processes. ``preload`` names modules that the first fork server of this process
    imports for all of them. Raises DataError if one of them is ended from outside.
    """
    if not workers:
        yield from map(function, items)
        return
    pool: list[_Worker] = []
    try:
        context = _context(preload)
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function, ahead), daemon=True)
            process.start()
            theirs.close()
            pool.append(_Worker(process, ours))
        turns = cycle(pool)
        out: deque[_Worker] = deque()
        for item in items:
            _send(worker := next(turns), item)
            out.append(worker)
            if len(out) == workers * ahead:
                yield _received(out.popleft())
        while out:
            yield _received(out.popleft())
    finally:
        _end(pool)


def _context(preload: Sequence[str]) -> ForkServerContext:
    """Forked from a server without threads, and without what CUDA keeps of a process.

    A rank that was itself forked from a server has its workers forked from the same one, with all imports done there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def _send(worker: _Worker, item: object) -> None:
    try:
        worker.connection.send(item)
    except OSError as error:
        raise _lost(worker) from error


def _received(worker: _Worker) -> Any:
    try:
        result = worker.connection.recv()
    except (EOFError, OSError) as error:
        raise _lost(worker) from error
    if isinstance(result, _Failure):
        raise RuntimeError(f"in a process that reads records:\n{result.text}")
    return result


def _lost(worker: _Worker) -> DataError:
    worker.process.join(_GRACE_SECONDS)
    status = worker.process.exitcode
    how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with status {status}"
    return DataError(
        f"a process that reads records was ended from outside, {how}; where memory is short, fewer of them, or fewer "
        "packs ahead, take less"
    )


def _end(pool: list[_Worker]) -> None:
    for worker in pool:
        worker.connection.close()
        worker.process.terminate()
    for worker in pool:
        worker.process.join(_GRACE_SECONDS)
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()


def _serve(connection: Connection, function: Callable[[Any], Any], ahead: int) -> None:
    """What a worker does: answer one item after another; a thread sends, so that the next is begun meanwhile."""
    _settle()
    answers: queue.Queue[Any] = queue.Queue(ahead)

    def send() -> None:
        try:
            while True:
                connection.send(answers.get())
        except OSError:  # nobody listens any more
            os._exit(0)

    threading.Thread(target=send, name="sends", daemon=True).start()
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answers.put(function(item))
        except Exception:  # noqa: BLE001  # a bug, which ends the rank with this traceback
            answers.put(_Failure(traceback.format_exc().rstrip()))


def _settle() -> None:
    """Make this process one that ends when the one that started it ends or says so, whoever else signals the group.

    Whether to stop is the rank's affair, which needs its workers until it has.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked, so that it can be asked who sent it: a rank that exits terminates its workers, and waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def follow() -> None:
        # The death of the parent is not told by the kernel: the parent that it knows is the fork server.
        while parent.is_alive():
            heard = signal.sigtimedwait({signal.SIGTERM}, _POLL_SECONDS)
            if heard is not None and heard.si_pid == parent.pid:
                break
        os._exit(1)

    threading.Thread(target=follow, name="follows its parent", daemon=True).start()
