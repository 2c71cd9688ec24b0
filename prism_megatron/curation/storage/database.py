"""The SQLite file of a store: its tables, and what its errors mean to a user."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_megatron.curation.storage.claims import lock
from prism_megatron.disk import writing
from prism_megatron.errors import DiskError, StoreError

_APPLICATION = 0x5052534D
"""PRSM: by which the file is told from other SQLite files"""
_VERSION = 1
_BUSY_SECONDS = 60.0
_DISK = {
    sqlite3.SQLITE_FULL: "no space left",
    sqlite3.SQLITE_IOERR: "the disk reports an error",
    sqlite3.SQLITE_READONLY: "it may not be written to",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
}
_PRIMARY = 0xFF
"""of the bits of an error of SQLite, those that name its kind"""

_TABLES = f"""
CREATE TABLE responses (
    key TEXT NOT NULL PRIMARY KEY,
    role TEXT NOT NULL,
    number INTEGER NOT NULL,
    request TEXT NOT NULL,
    kind TEXT NOT NULL,
    text TEXT NOT NULL,
    finish TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    answer_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,
    endpoint TEXT NOT NULL,
    tries INTEGER NOT NULL
);
CREATE TABLE claims (key TEXT NOT NULL PRIMARY KEY, claimant TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX claims_of ON claims (claimant);
CREATE TABLE totals (responses INTEGER, billionths INTEGER, prompt_tokens INTEGER, answer_tokens INTEGER);
INSERT INTO totals VALUES (0, 0, 0, 0);
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""


def open_database(path: Path) -> None:
    """Make the file where there is none, and see that it is a store of this version.

    Raises DiskError where the disk refuses, StoreError where the file is no such store.
    """
    with writing(path), _alone_beside(path), errors_of(path):
        connection = connect(path)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not num_tables and not application:
                connection.executescript(f"BEGIN IMMEDIATE;{_TABLES}COMMIT;")
                return
        finally:
            connection.close()
    if application != _APPLICATION:
        raise StoreError(f"{path} is another program's database; give another --store")
    if version != _VERSION:
        raise StoreError(
            f"{path} is a store of version {version}, and this program reads version {_VERSION}; use the version of "
            "the program that wrote it, or give another --store"
        )


def connect(path: Path) -> sqlite3.Connection:
    """A connection that threads may share, one at a time; transactions begin and end where it is told so."""
    return sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Raise what an error of SQLite means to a user: DiskError or StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        meaning = error_of(error, path)
        if meaning is error:
            raise
        raise meaning from error


def error_of(error: Exception, path: Path) -> Exception:
    """The DiskError or StoreError that an error, raised in work on ``path``, stands for; any other as it is."""
    if not isinstance(error, sqlite3.DatabaseError) or isinstance(error, sqlite3.ProgrammingError):
        return error
    code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY
    if code in _DISK:
        return DiskError(f"{path} cannot be written: {_DISK[code]} ({error})")
    if code == sqlite3.SQLITE_BUSY:
        return StoreError(f"another process has kept {path} to itself for {_BUSY_SECONDS:.0f} s; end it, or try again")
    return StoreError(f"{path} is damaged, or no store of responses ({error}); move it away, or give another --store")


@contextmanager
def _alone_beside(path: Path) -> Iterator[None]:
    """Keep others from making the file meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock(folder, fcntl.LOCK_EX, path.parent)
        yield
    finally:
        os.close(folder)
