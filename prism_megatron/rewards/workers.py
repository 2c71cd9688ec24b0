"""Processes that work out rewards beside a run: what goes to them, and what comes back, in futures.

Each has a supervisor (``rewards/supervisor.py``) that is started at the first item for it, with pipes of its own. Which
process gets an item changes no outcome: items are independent, and each has its own clock. All of them are gone when
``close`` returns, and when the run ends in any other way.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from prism_megatron.errors import RewardError

_BOOT = (
    "import json, sys; settings = json.loads(sys.stdin.readline()); sys.path[:] = settings['path']; "
    "from prism_megatron.rewards.supervisor import main; main(settings)"
)
_MOST_IN_A_BATCH = 16
_TRIES = 2
_GRACE_SECONDS = 5.0
_CLOSED = "the processes that work out rewards were closed"
_LOST = "a process that works out rewards was ended from outside, twice; is memory short?"

Item = Any
Answer = list[Any]
"""``["done", …]``, ``["killed", why]`` or ``["failed", why]``."""


@dataclass(frozen=True)
class WorkSettings:
    """What the processes do, and the limits of one item."""

    function: str | None = None
    """a user's function; None checks answers"""
    cpu_seconds: float | None = 1.0
    """of the worker's own CPU time; None leaves the wall clock alone"""
    wall_seconds: float = 30.0
    memory_bytes: int = 2**30


class _Job:
    def __init__(self, item: Item) -> None:
        self.item = item
        self.answer: Future[Answer] = Future()
        self.tries = 0


class _Supervised:
    """One supervisor and its pipes, started."""

    def __init__(self, settings: WorkSettings) -> None:
        """Raises RewardError where the process cannot do what the settings ask for."""
        # A session of its own: Ctrl-C is the run's to hear.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )
        try:
            reply = self.ask({"path": [entry or str(Path.cwd()) for entry in sys.path], **asdict(settings)})
        except EOFError:
            self.end()
            raise RewardError("a process that works out rewards did not start; its error stands above") from None
        if reply[0] == "refused":
            self.end()
            raise RewardError(reply[1])

    def ask(self, message: Any) -> Any:
        """Send a line and wait for one. Raises EOFError where the process is gone."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except (OSError, ValueError):  # ValueError: closed by another thread
            raise EOFError from None
        if not line.endswith("\n"):
            raise EOFError
        return json.loads(line)

    def end(self) -> None:
        """Have it kill and reap its worker, and wait until both are gone."""
        self.process.terminate()
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its session, which it leads until it is reaped
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError, ValueError):
                    pipe.close()


class Workers:
    """So many processes with one queue. A context manager; ``close`` ends them."""

    def __init__(self, settings: WorkSettings, *, workers: int) -> None:
        """Starts nothing yet."""
        self._settings = settings
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_workers = workers
        self._threads: list[threading.Thread] = []
        self._supervised: list[_Supervised] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._finalizer = weakref.finalize(self, _abandon, self._lock, self._closed, self._supervised)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the processes now. Raises RewardError where they cannot do what was asked for."""
        with self._lock:
            if self._closed.is_set():
                raise RewardError(_CLOSED)
            if self._threads:
                return
            first = self._started()  # an error here is the caller's
            for number in range(self._num_workers):
                thread = threading.Thread(
                    target=self._feed, args=(first if number == 0 else None,), name="feeds a reward worker", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def submit(self, items: Sequence[Item]) -> list[Future[Answer]]:
        """Have items worked out, each apart from the others. Raises RewardError as ``start`` does."""
        if items:
            self.start()
        jobs = [_Job(item) for item in items]
        for job in jobs:
            self._jobs.put(job)
        return [job.answer for job in jobs]

    def close(self) -> None:
        """End all processes; what was not worked out raises RewardError where it is waited for."""
        with self._lock:
            self._closed.set()
            for _ in self._threads:
                self._jobs.put(None)
            _end_all(self._supervised)
        for thread in self._threads:
            thread.join()
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                _failed([job], _CLOSED)

    def _started(self) -> _Supervised:
        one = _Supervised(self._settings)
        self._supervised.append(one)
        return one

    def _feed(self, supervised: _Supervised | None) -> None:
        """Take batches from the queue and set their futures, until there are none to come."""
        while batch := self._next_batch():
            while batch:
                try:
                    supervised = supervised or self._replacement()
                    answers = supervised.ask([job.item for job in batch])
                except EOFError:
                    self._drop(supervised)
                    supervised, batch = None, self._once_more(batch)
                except RewardError as error:
                    batch = _failed(batch, str(error))
                else:
                    for job, answer in zip(batch, answers, strict=True):
                        job.answer.set_result(answer)
                    batch = []

    def _once_more(self, batch: list[_Job]) -> list[_Job]:
        """What of a batch is tried again after its process was lost."""
        again = []
        for job in batch:
            job.tries += 1
            if job.tries < _TRIES and not self._closed.is_set():
                again.append(job)
            else:
                _failed([job], _CLOSED if self._closed.is_set() else _LOST)
        return again

    def _drop(self, lost: _Supervised | None) -> None:
        with self._lock:
            if lost in self._supervised:  # unless closing has taken it
                lost.end()
                self._supervised.remove(lost)

    def _replacement(self) -> _Supervised:
        with self._lock:
            if self._closed.is_set():
                raise RewardError(_CLOSED)
            return self._started()

    def _next_batch(self) -> list[_Job]:
        job = self._jobs.get()
        if job is None:
            return []
        batch = [job]
        # A share of what waits, so that the last items do not queue behind one process.
        most = min(_MOST_IN_A_BATCH, 1 + self._jobs.qsize() // self._num_workers)
        while len(batch) < most:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            batch.append(job)
        return batch


def _failed(batch: list[_Job], why: str) -> list[_Job]:
    """Tell those who wait; nothing of the batch is left."""
    for job in batch:
        job.answer.set_exception(RewardError(why))
    return []


def _end_all(supervised: list[_Supervised]) -> None:
    for one in supervised:
        one.end()
    supervised.clear()


def _abandon(lock: threading.Lock, closed: threading.Event, supervised: list[_Supervised]) -> None:
    """Of a run that ends without ``close``: no thread may start another process."""
    with lock:
        closed.set()
        _end_all(supervised)
