"""The one thread that writes to a store: what is to be done waits, is done in one transaction, and then is known.

Many calls end at about the same time; one transaction for all of them costs the disk one wait instead of many.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from prism_megatron.curation.storage.database import connect, error_of, errors_of
from prism_megatron.errors import PrismError, StoreError

_AT_ONCE = 256
_Result = TypeVar("_Result")
Work = Callable[[sqlite3.Connection], Any]


class Writer:
    """Does work in transactions. The first error of the database ends it, since the disk is full or damaged then."""

    def __init__(self, path: Path) -> None:
        """``path`` is a database that is there. Raises DiskError, StoreError."""
        self._path = path
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[Work, Future[Any]] | None] = queue.SimpleQueue()
        self._closed = False
        with errors_of(path):
            self._database = connect(path)
            # A response that was paid for is to be there after a power cut as well.
            self._database.execute("PRAGMA synchronous = FULL")
        self._thread = threading.Thread(target=self._run, name="writes of the store", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[sqlite3.Connection], _Result]) -> Future[_Result]:
        """What ``work`` returns, once it is on the disk; the future raises DiskError or StoreError where it is not."""
        future: Future[_Result] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                future.set_exception(StoreError(f"{self._path} is closed"))
            else:
                self._waiting.put((work, future))
        return future

    def close(self) -> None:
        """Do what was submitted, and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        failure: Exception | None = None
        while batch := self._next():
            if failure is None:
                failure = self._do(batch)
            else:
                _tell(batch, failure)
        self._database.close()

    def _next(self) -> list[tuple[Work, Future[Any]]]:
        """All that waits, at least one; nothing at the end."""
        batch = []
        one = self._waiting.get()
        while one is not None:
            batch.append(one)
            if len(batch) == _AT_ONCE or self._waiting.empty():
                return batch
            one = self._waiting.get()
        if batch:
            self._waiting.put(None)
        return batch

    def _do(self, batch: list[tuple[Work, Future[Any]]]) -> Exception | None:
        """The error that kept the batch from the disk."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            results = [work(self._database) for work, _ in batch]
            self._database.execute("COMMIT")
        except (sqlite3.Error, OSError, PrismError) as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            failure = error_of(error, self._path)
            _tell(batch, failure)
            return failure
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
        return None


def _tell(batch: list[tuple[Work, Future[Any]]], failure: Exception) -> None:
    for _, future in batch:
        future.set_exception(failure)
