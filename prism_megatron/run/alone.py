"""One command at a time in a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_megatron.disk import writing
from prism_megatron.errors import ConfigError

_LOCK = ".lock"


@contextmanager
def alone_in(folder: Path, *, command: str) -> Iterator[None]:
    """Keep others that ask the same out of the folder, which is made; the kernel lets go of it when this process ends,
    however it does.

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
        yield
