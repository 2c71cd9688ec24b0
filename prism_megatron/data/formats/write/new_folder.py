"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_megatron.disk import disk_error
from prism_megatron.errors import DataError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write into, which takes its name when the block ends, after everything is flushed.

    Nothing is left of it where the block raises; one that a killed process left is written anew. Raises DataError if
    ``target`` is there already, and DiskError for what the disk does not take.
    """
    if target.exists() or target.is_symlink():
        raise DataError(f"{target} is there already; name a folder that is not")
    aside = target.absolute().with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for folder, _, files in os.walk(aside):
            for name in files:
                flush(Path(folder) / name)
            flush(Path(folder))
        aside.rename(target)
        flush(target.absolute().parent)
    except (OSError, sqlite3.Error) as error:  # of an index that is written into it
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(error, target.absolute().parent) or DataError(
            f"{target} cannot be written: {error}"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Have a file or a folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
