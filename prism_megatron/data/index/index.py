"""Where every record of a corpus lies and how long it is, in memory-mapped columns that are made once.

An index is a folder named by a hash of all that its columns depend on: the files of the corpus (path, size, time of the
last change) and how they are read, tokenizer, template, image sizes, system prompt, and the part held out. It holds one
``.npy`` file for each column, ``about.json``, and ``bad.jsonl`` with each record that cannot be used and the reason.
Blind spots: an image that is exchanged without its record is noticed when it is rendered, by its length; one that
cannot be decoded, by then too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_megatron.config.stages.data import OnBad
from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.files.base import Corpus, Place
from prism_megatron.data.index.build import build_columns
from prism_megatron.data.index.columns import COLUMNS, BadRecord, Counting
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.disk import writing
from prism_megatron.errors import DataError

VERSION = 1
ABOUT, BAD = "about.json", "bad.jsonl"
NUM_SHOWN = 5


class Index:
    """The columns of one corpus, one row for each usable record, in the corpus's order. Pickled by its folder."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder that holds no whole index of this version."""
        self.folder = folder
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            self._columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
            self.shards = tuple(Path(path) for path in about["shards"])
            self.sources: tuple[str, ...] = tuple(about["sources"])
            self.num_bad = int(about["bad"])
            sound = about["version"] == VERSION and all(
                column.shape == (about["records"],) and column.dtype == COLUMNS[name]
                for name, column in self._columns.items()
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is no whole index: {error}; remove it, and it is made again") from error
        if not sound:
            raise DataError(f"{folder} is no whole index; remove it, and it is made again")

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.folder,)

    def __len__(self) -> int:
        return len(self._columns["shard"])

    def column(self, name: str) -> npt.NDArray[Any]:
        """One of ``COLUMNS``, memory-mapped."""
        column: npt.NDArray[Any] = self._columns[name]
        return column

    def where(self, row: int) -> str:
        """``file:number`` of a record."""
        return self.place(row).of(self.shard(row))

    def shard(self, row: int) -> Path:
        return self.shards[int(self._columns["shard"][row])]

    def place(self, row: int) -> Place:
        return Place(*(int(self._columns[name][row]) for name in ("offset", "size", "number")))

    def read(self, corpus: Corpus, row: int) -> Conversation:
        """The record of a row. Raises DataError, naming it, if it is no longer what it was."""
        return corpus.read(self.shard(row), self.place(row))

    def bad_records(self) -> list[BadRecord]:
        """All that cannot be used, in the corpus's order."""
        with (self.folder / BAD).open(encoding="utf-8") as file:
            return [BadRecord(**json.loads(line)) for line in file]


def open_index(
    corpus: Corpus,
    render: ConversationRenderer,
    root: Path,
    *,
    validation_share: float,
    on_bad: OnBad,
    workers: int,
    counting: Counting,
) -> Index:
    """The index of a corpus below ``root``: the one that is there, or one that ``workers`` processes make (0: this).

    Bad records are known at once, all of them. Raises DataError if there are any and they are to ``fail``, naming the
    first and the file that lists them, or if no record is usable; DiskError if it cannot be written.
    """
    shards = corpus.shards()
    folder = root / key_of(corpus, shards, render, validation_share=validation_share)
    if not folder.exists():
        built = build_columns(
            corpus, shards, render, validation_share=validation_share, workers=workers, counting=counting
        )
        _write(folder, built.columns, shards=shards, sources=built.sources, bad=built.bad)
    index = Index(folder)
    if index.num_bad and on_bad == "fail":
        raise DataError(_complaint(index))
    if not len(index):
        first = f": {index.bad_records()[0].reason}" if index.num_bad else ""
        raise DataError(f"{shards[0]}: no record can be used of {index.num_bad}{first}")
    return index


def key_of(corpus: Corpus, shards: Sequence[Path], render: ConversationRenderer, *, validation_share: float) -> str:
    """Name of the index's folder. Raises DataError for a shard that is not there."""
    try:
        stats = [path.stat() for path in shards]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    files = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(shards, stats, strict=True)]
    whole = [VERSION, corpus.name, corpus.settings, files, render.fingerprint, validation_share]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32]


def _write(
    folder: Path,
    columns: dict[str, npt.NDArray[Any]],
    *,
    shards: Sequence[Path],
    sources: Sequence[str],
    bad: Sequence[BadRecord],
) -> None:
    """Aside first, then by one rename; of two that make the same index at once, one is kept."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    about = {
        "version": VERSION,
        "records": len(columns["shard"]),
        "bad": len(bad),
        "shards": list(map(str, shards)),
        "sources": list(sources),
    }
    with writing(aside):
        aside.mkdir(parents=True, exist_ok=True)
        try:
            for name, column in columns.items():
                np.save(aside / f"{name}.npy", column)
            lines = [json.dumps({"where": one.where, "reason": one.reason}) + "\n" for one in bad]
            (aside / BAD).write_text("".join(lines), encoding="utf-8")
            (aside / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            for path in aside.iterdir():
                _flush(path)
            aside.rename(folder)
        except OSError:
            for path in aside.iterdir():
                path.unlink()
            aside.rmdir()
            if not (folder / ABOUT).is_file():
                raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complaint(index: Index) -> str:
    bad = index.bad_records()
    if len(bad) == 1:
        return bad[0].reason
    shown = "; ".join(one.reason for one in bad[:NUM_SHOWN])
    return (
        f"{len(bad)} of {len(bad) + len(index)} records are bad: {shown}"
        f"{'; …' if len(bad) > NUM_SHOWN else ''} (all of them: {index.folder / BAD})"
    )
