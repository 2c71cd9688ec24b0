"""One command at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_megatron.disk import writing
from prism_megatron.errors import ConfigError

_LOCK = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
"""What a file system that knows no locks answers, such as Lustre where it is mounted without them."""


@contextmanager
def alone_in(folder: Path, *, command: str) -> Iterator[None]:
    """Keep others that ask the same out of the folder, which is made; the kernel lets go of it when this process ends,
    however it does. On a file system without locks nobody is kept out.

    Raises ConfigError where another one is at work there, DiskError where the folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another {command} is at work in {folder}; let it end, or give another --output") \
                from error  # fmt: skip
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


def remove_unused(folder: Path) -> None:
    """Remove a folder that holds nothing but its lock; whoever is alone in it calls this, and leaves it then."""
    with suppress(OSError):
        if [one.name for one in folder.iterdir()] == [_LOCK]:
            (folder / _LOCK).unlink()
            folder.rmdir()
