"""Every response of an endpoint, once: what is stored is never asked for again, by whichever process.

Several processes on one host may share a store. Who is about to ask a call claims it; others wait for the response, or
claim it themselves once that process is gone.
"""

from __future__ import annotations

import enum
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeVar

from prism_megatron.curation.calls import Call, Response
from prism_megatron.curation.storage.claims import Claimant
from prism_megatron.curation.storage.compact import compact_request
from prism_megatron.curation.storage.database import connect, errors_of, open_database
from prism_megatron.curation.storage.writer import Writer

_COLUMNS = "kind, text, finish, prompt_tokens, answer_tokens, cost, endpoint, tries"
_BILLION = 10**9
_Result = TypeVar("_Result")


class Claim(enum.Enum):
    """How a call stands that has no response yet."""

    FREE = "nobody asks it"
    OURS = "whoever claimed it asks it now, and no other"
    THEIRS = "another one asks it"


@dataclass(frozen=True)
class Totals:
    """Of all responses in a store, whichever process they are of."""

    responses: int
    cost: float
    prompt_tokens: int
    answer_tokens: int


class Store:
    """Threads may share it; a forked child may not use it, and opens its own."""

    def __init__(self, path: Path) -> None:
        """Open the file, which is made where there is none. Raises DiskError or StoreError, which say what is wrong."""
        self.path = path
        self._process = os.getpid()
        open_database(path)
        self._claimant = Claimant(path)
        self._claimant.remove_dead()
        self._lock = threading.Lock()
        with errors_of(path):
            self._database = connect(path)
        self._writer = Writer(path)

    def get(self, key: str) -> Response | None:
        """The response to a call, where it is stored. Raises StoreError, DiskError."""
        with self._reading() as database:
            return _stored(database, key)

    def look(self, key: str) -> Response | Claim:
        """The response to a call, or who is about to ask it. Raises StoreError, DiskError."""
        with self._reading() as database:
            response, claimant = _stored(database, key), _claimant_of(database, key)
        if response is not None:
            return response
        return Claim.THEIRS if claimant is not None and self._claimant.is_alive(claimant) else Claim.FREE

    def claim(self, key: str) -> Future[Response | Claim]:
        """Have the call for oneself: the future gives OURS, or THEIRS, or the response that came before.

        What is claimed is put or released. The future may raise StoreError, DiskError.
        """

        def work(database: sqlite3.Connection) -> Response | Claim:
            if (response := _stored(database, key)) is not None:
                return response
            claimant = _claimant_of(database, key)
            if claimant is not None and self._claimant.is_alive(claimant):
                return Claim.THEIRS
            database.execute("DELETE FROM claims WHERE claimant = ?", (claimant,))
            database.execute("INSERT INTO claims VALUES (?, ?)", (key, self._claimant.token))
            return Claim.OURS

        return self._write(work)

    def put(self, key: str, call: Call, response: Response) -> Future[Response]:
        """Store the response to a call that was claimed; ``key`` is the call's.

        The future gives what is stored, once that is on the disk, or raises StoreError, DiskError.
        """
        request = compact_request(call.body)

        def work(database: sqlite3.Connection) -> Response:
            row = (key, call.role, call.number, request, *astuple(response))
            database.execute("DELETE FROM claims WHERE key = ?", (key,))
            if (first := _stored(database, key)) is not None:
                return first
            database.execute(f"INSERT INTO responses VALUES ({', '.join('?' * len(row))})", row)
            database.execute(
                "UPDATE totals SET responses = responses + 1, billionths = billionths + ?, "
                "prompt_tokens = prompt_tokens + ?, answer_tokens = answer_tokens + ?",
                (round(response.cost * _BILLION), response.prompt_tokens, response.answer_tokens),
            )
            return response

        return self._write(work)

    def release(self, key: str) -> Future[None]:
        """Let others ask a call that was claimed and is not asked any more."""

        def work(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM claims WHERE key = ? AND claimant = ?", (key, self._claimant.token))

        return self._write(work)

    def totals(self) -> Totals:
        """What all responses cost so far, to a billionth of the unit of prices. Raises StoreError, DiskError."""
        with self._reading() as database:
            responses, billionths, prompt, answer = database.execute("SELECT * FROM totals").fetchone()
        return Totals(responses, billionths / _BILLION, prompt, answer)

    def close(self) -> None:
        """Write what is to be written, and let go of the file and of all claims."""
        self._writer.close()
        self._database.close()
        self._claimant.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        assert os.getpid() == self._process, "a forked child opens a store of its own"
        with self._lock, errors_of(self.path):
            yield self._database

    def _write(self, work: Callable[[sqlite3.Connection], _Result]) -> Future[_Result]:
        assert os.getpid() == self._process, "a forked child opens a store of its own"
        return self._writer.submit(work)


def _stored(database: sqlite3.Connection, key: str) -> Response | None:
    row = database.execute(f"SELECT {_COLUMNS} FROM responses WHERE key = ?", (key,)).fetchone()
    return None if row is None else Response(*row)


def _claimant_of(database: sqlite3.Connection, key: str) -> str | None:
    row = database.execute("SELECT claimant FROM claims WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])
