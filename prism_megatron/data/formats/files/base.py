"""What a format has to bring, so that an index can find its records and a loader can read any one of them.

A corpus is one set in one format: a file or a folder, cut into shards (files). It is made of cheap parts (paths and
settings) and is sent to worker processes, so it keeps no open files that cannot be opened again: ``ByteReader`` is
there for that. A mixture is several corpora.

Example, a format of one conversation a line (see ``jsonl.py``)::

    @dataclass(frozen=True)
    class Lines:
        path: Path
        reader: ByteReader = field(default_factory=ByteReader, compare=False)
        name: ClassVar[str] = "lines"

        @property
        def settings(self) -> str:
            return ""

        def shards(self) -> tuple[Path, ...]:
            return (self.path,)

        def scan(self, shard: Path) -> Iterator[Place]:
            return line_places(shard)

        def read(self, shard: Path, place: Place) -> Conversation:
            return parse(self.reader.read(shard, place), where=place.of(shard))
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from prism_megatron.data.conversation import Conversation
from prism_megatron.errors import DataError

MAX_OPEN_FILES = 64
_SCAN_BYTES = 2**22


class Place(NamedTuple):
    """Where a record lies in its shard.

    ``offset`` and ``size`` are whole numbers that only the format itself reads: bytes of a file of lines or of a tar,
    row group and row of a Parquet file. ``number`` is what a person counts to find it: line, row or sample, from 1.
    """

    offset: int
    size: int
    number: int

    def of(self, shard: Path) -> str:
        """``file:number``, by which messages name the record."""
        return f"{shard}:{self.number}"


@runtime_checkable
class Corpus(Protocol):
    """One set in one format. Can be pickled."""

    @property
    def name(self) -> str:
        """Of the format, as a flag takes it."""

    @property
    def settings(self) -> str:
        """Whatever changes what is read beside the files of ``shards``, such as names of columns, as text."""

    def shards(self) -> tuple[Path, ...]:
        """The files that hold the records, in a fixed order. Raises DataError if there are none."""

    def scan(self, shard: Path) -> Iterator[Place]:
        """Where every record of a shard lies, in order, without reading more than that takes.

        Raises DataError if the shard as a whole cannot be read.
        """

    def read(self, shard: Path, place: Place) -> Conversation:
        """One record, checked. Images named by it exist inside the set's folder; their pixels are not read.

        Raises DataError, naming shard, record (``place.of(shard)``) and field, if it is malformed.
        """


class ByteReader:
    """Reads ranges of bytes from files that it keeps open, a few at a time. Pickled, it starts anew without any."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __reduce__(self) -> tuple[type[ByteReader], tuple[()]]:
        return ByteReader, ()

    def read(self, path: Path, place: Place) -> bytes:
        """The bytes of a place. Raises DataError if the file has not that many, or cannot be read."""
        try:
            data = os.pread(self._descriptor(path), place.size, place.offset)
        except OSError as error:
            raise DataError(f"{place.of(path)}: cannot be read: {error.strerror or error}") from error
        if len(data) != place.size:
            raise DataError(f"{place.of(path)}: the file ends in the record; it has changed since it was indexed")
        return data

    def close(self) -> None:
        """Close every file. Reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]


def line_places(path: Path) -> Iterator[Place]:
    """Every line of a file that is not blank, without its line end. Raises DataError if it cannot be read.

    No line is put together, so that time grows with the file alone, however long its lines are.
    """
    position, start, number, has_text = 0, 0, 1, False  # of the block, and of the line under way
    try:
        with path.open("rb") as file:
            while block := file.read(_SCAN_BYTES):
                begin = 0
                while (end := block.find(b"\n", begin)) >= 0:
                    if has_text or _has_text(block[begin:end]):
                        yield Place(start, position + end - start, number)
                    begin, start, number, has_text = end + 1, position + end + 1, number + 1, False
                has_text = has_text or _has_text(block[begin:])
                position += len(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if has_text:
        yield Place(start, position - start, number)


def _has_text(piece: bytes) -> bool:
    return bool(piece) and not piece.isspace()
