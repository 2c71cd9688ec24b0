"""Who asks a call: a process that says so, for as long as it lives.

Every store that is open has a file beside the database, on which it holds a lock. The kernel lets go of the lock when
the process ends, however it does, so that what a killed process was about to ask is free at once.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import weakref
from contextlib import closing
from pathlib import Path

from prism_megatron.disk import writing
from prism_megatron.errors import StoreError

_SUFFIX = ".lock"


class Claimant:
    """One that claims calls, known to others by its ``token``."""

    def __init__(self, database: Path) -> None:
        """Raises DiskError where no file can be made beside the database, StoreError where it cannot be locked."""
        self._database = database
        with writing(database):
            self.token, self._descriptor = _locked_file(database)
        _HELD.add(self)

    def is_alive(self, token: str) -> bool:
        """Whether the one with this token is still there. The file of one that is gone is removed."""
        return _is_locked(_file_of(self._database, token))

    def remove_dead(self) -> None:
        """Remove the files of all that are gone."""
        for path in self._database.parent.iterdir():
            if path.name.startswith(f"{self._database.name}.") and path.suffix == _SUFFIX:
                _is_locked(path)

    def close(self) -> None:
        """Let go of the lock; what was claimed is free."""
        if self._descriptor is not None:
            _file_of(self._database, self.token).unlink(missing_ok=True)
            self.let_go()

    def let_go(self) -> None:
        """Close the file, as a forked child must, whose copy of it would keep the lock of its parent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_HELD: weakref.WeakSet[Claimant] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for claimant in _HELD:
        claimant.let_go()


os.register_at_fork(after_in_child=_let_go_in_child)


def _file_of(database: Path, token: str) -> Path:
    return database.with_name(f"{database.name}.{token}{_SUFFIX}")


def _locked_file(database: Path) -> tuple[str, int | None]:
    """A new token, and the descriptor of its file, which is locked."""
    while True:
        token = secrets.token_hex(8)
        path = _file_of(database, token)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path) and path.exists():
            return token, descriptor
        # Another process took the file for that of a dead one before it was locked.
        os.close(descriptor)


def _is_locked(path: Path) -> bool:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return False
    with closing(file):
        if not lock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, path):
            return True
        path.unlink(missing_ok=True)
        return False


def lock(descriptor: int, kind: int, path: Path) -> bool:
    """Whether the lock, of a ``kind`` as ``fcntl.flock`` knows it, was to be had; ``path`` is what is locked.

    Raises StoreError where the file system knows no locks.
    """
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StoreError(
            f"{path} cannot be locked ({error.strerror}); give a --store on a file system that knows locks, such as a "
            "local disk"
        ) from error
    return True
