"""Files whose records are rows: JSON lines, one JSON array, Parquet. What a row means is the format's own matter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.energon import ALL
from prism_megatron.data.formats.files.base import ByteReader, Place, line_places
from prism_megatron.data.formats.files.json_array import array_places
from prism_megatron.data.formats.files.parquet import ParquetReader, parquet_places
from prism_megatron.data.formats.files.reading import Reading, Row, object_in, row_of
from prism_megatron.errors import DataError

SCANS: dict[str, Callable[[Path], Iterator[Place]]] = {
    ".jsonl": line_places,
    ".json": array_places,
    ".parquet": parquet_places,
}
ABOUT_FILES = ("dataset_info.json", "dataset_infos.json", "sets.json", "state.json", "config.json")
"""What stands beside records and holds none."""
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}")
PART_NAMES = ("train", "validation", "val", "dev", "test")


class RowParser(Protocol):
    """What a format of rows brings. A function of a module, so that it can be pickled."""

    def __call__(self, row: Row, *, where: str, reading: Reading) -> Conversation: ...


@dataclass(frozen=True)
class RowCorpus:
    """A file of rows, or a folder with one, or with several Parquet files."""

    name: str
    path: Path
    reading: Reading
    parse: RowParser
    lines: ByteReader = field(default_factory=ByteReader, compare=False, repr=False)
    tables: ParquetReader = field(default_factory=ParquetReader, compare=False, repr=False)

    @property
    def settings(self) -> str:
        return self.reading.settings

    def shards(self) -> tuple[Path, ...]:
        """Raises DataError as ``row_files``."""
        return row_files(self.path, split=self.reading.config.split)

    def scan(self, shard: Path) -> Iterator[Place]:
        """Raises DataError for a file that is none of the three kinds, or cannot be read."""
        return scan_of(shard)(shard)

    def row(self, shard: Path, place: Place) -> Row:
        """The record as it is stored. Raises DataError."""
        if shard.suffix == ".parquet":
            return self.tables.row(shard, place)
        where = place.of(shard)
        return row_of(object_in(self.lines.read(shard, place), where), where)

    def read(self, shard: Path, place: Place) -> Conversation:
        """Raises DataError for a malformed record."""
        return self.parse(self.row(shard, place), where=place.of(shard), reading=self.reading)


def scan_of(shard: Path) -> Callable[[Path], Iterator[Place]]:
    """How records of a file are found. Raises DataError for an unknown ending."""
    if shard.suffix not in SCANS:
        raise DataError(f"{shard}: records are read from files that end in {', '.join(SCANS)}")
    return SCANS[shard.suffix]


def row_files(path: Path, *, split: str) -> tuple[Path, ...]:
    """The files of a set, in order. Raises DataError if there are none, or several of which only some can be meant."""
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise DataError(f"{path} does not exist; name a file or a folder of records")
    tables = sorted(inside(path, path.rglob("*.parquet")))
    texts = sorted(
        file
        for file in inside(path, path.iterdir())
        if file.suffix in (".jsonl", ".json") and file.name not in ABOUT_FILES and file.is_file()
    )
    if tables and not texts:
        return _of_split(tables, split, path)
    if len(texts) == 1 and not tables:
        return (texts[0],)
    if not texts and not tables:
        raise DataError(f"{path} holds no file that ends in {', '.join(SCANS)}")
    found = ", ".join(file.name for file in [*texts, *tables][:5])
    raise DataError(f"{path} holds several files of records ({found}); name the one that is meant")


def inside(folder: Path, files: Iterator[Path]) -> Iterator[Path]:
    """Files, each with its links followed inside ``folder``; a Hugging Face cache's own links lead to its blobs.

    Raises DataError for a link that leads elsewhere.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    for file in files:
        try:
            target = file.resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            raise DataError(f"{file} cannot be found: {error}") from error
        if not target.is_relative_to(root):
            raise DataError(f"{file} is a link that leads out of {root}; copy the file into the set")
        yield file


def _of_split(tables: list[Path], split: str, path: Path) -> tuple[Path, ...]:
    """Those of one part, where files are named after the parts that sets are published in."""
    parts: dict[Any, list[Path]] = {}
    for table in tables:
        named = _PART.fullmatch(table.stem)
        stem = named[1] if named else table.stem
        parts.setdefault(stem if stem in PART_NAMES else None, []).append(table)
    if list(parts) == [None] or split == ALL:
        return tuple(tables)
    if split not in parts:
        names = ", ".join(str(part) for part in parts if part)
        raise DataError(f"{path} has files of {names}, and none of {split}; --split {names} or {ALL}")
    return tuple(parts[split])
