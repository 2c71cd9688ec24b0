"""What is written to a disk is written whole, under the mode that the umask gives, or the error says what was not.

``tempfile`` makes files and folders for their owner alone: what is to stay is made here instead.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_megatron.errors import DiskError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_TEXT = "no space left"
_NOTHING_LEFT_BYTES = 2**20


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise DiskError, naming ``path``, for whatever the operating system refuses while it is written."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {_reason(error)}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: a reader, or a kill, meets the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def folder_beside(path: Path) -> Path:
    """Make a hidden folder of a new name beside ``path``, to be filled and renamed to it."""
    while True:
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with suppress(FileExistsError):
            aside.mkdir()
            return aside


def open_to_umask(file: Path) -> None:
    """Give a file that a library made for its owner alone the mode that it would have had from ``open()``.

    Its folder, which was made plainly, shows the umask; asking the kernel would change it for all threads.
    """
    file.chmod(file.parent.stat().st_mode & 0o666)


def disk_error(error: BaseException, folder: Path) -> DiskError | None:
    """The DiskError that ``error``, raised by a library that wrote into ``folder``, stands for; None if it is none.

    Libraries in other languages raise errors of their own for a full disk, some without saying so.
    """
    if isinstance(error, DiskError):
        return error
    if isinstance(error, OSError) and (error.errno in _FULL or error.errno == errno.EROFS):
        return DiskError(f"{error.filename or folder} cannot be written: {_reason(error)}")
    if _FULL_TEXT in str(error).lower() or free_bytes(folder) < _NOTHING_LEFT_BYTES:
        return DiskError(f"{folder} cannot be written: {_FULL_TEXT} on device")
    return None


def check_room(folder: Path, needed: int, *, what: str) -> None:
    """Raise DiskError where the disk of ``folder`` has not ``needed`` bytes left for ``what``."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskError(f"{what} needs {_size(needed)}, and {folder} has {_size(free)} left: {_FULL_TEXT} on device")


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written below ``folder``, or below the nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason[:1].lower() + reason[1:]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
