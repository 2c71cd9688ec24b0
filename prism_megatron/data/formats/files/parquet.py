"""Rows of Parquet files. pyarrow is the extra ``parquet``, and is imported where a file is opened.

A row group is decoded as a whole and kept until another one is asked for: reading in order costs each group once.
Reading at random costs a group a row, so sets that are trained on in another order are better written as shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism_megatron.data.formats.files.base import Place
from prism_megatron.errors import ConfigError, DataError

_MAX_OPEN_FILES = 8


def parquet_places(path: Path) -> Iterator[Place]:
    """Row group, row in it and number of every row, from the file's footer alone. Raises DataError."""
    with _reading(path):
        footer = _opened(path).metadata
        counts = [int(footer.row_group(group).num_rows) for group in range(footer.num_row_groups)]
    number = 0
    for group, count in enumerate(counts):
        for row in range(count):
            number += 1
            yield Place(group, row, number)


class ParquetReader:
    """Reads single rows. Pickled, it starts anew without open files."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}
        self._group: tuple[Path, int] | None = None
        self._table: Any = None

    def __reduce__(self) -> tuple[type[ParquetReader], tuple[()]]:
        return ParquetReader, ()

    def row(self, path: Path, place: Place) -> dict[str, Any]:
        """A row by its columns' names, as plain Python values. Raises DataError."""
        with _reading(path, place):
            if self._group != (path, place.offset):
                self._group, self._table = None, None  # the old group goes before the new one comes
                self._table = self._file(path).read_row_group(place.offset, use_threads=False)
                self._group = (path, place.offset)
            (row,) = self._table.slice(place.size, 1).to_pylist()
        assert isinstance(row, dict)
        return row

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = _opened(path)
        return self._files[path]


def _opened(path: Path) -> Any:
    parquet = _pyarrow()[1]
    # No threads of pyarrow's own: workers are forked.
    return parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)


def _pyarrow() -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("reading Parquet needs pyarrow: pip install 'prism-megatron[parquet]'") from error
    return pa, pq


@contextmanager
def _reading(path: Path, place: Place | None = None) -> Iterator[None]:
    arrow = _pyarrow()[0]
    where = str(path) if place is None else place.of(path)
    try:
        yield
    # What a damaged file makes of lengths and texts; ArrowException is a kind of its own beside these.
    except (arrow.ArrowException, OSError, ValueError, IndexError, KeyError, MemoryError, OverflowError) as error:
        line = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise DataError(f"{where}: cannot be read as Parquet: {line}") from error
