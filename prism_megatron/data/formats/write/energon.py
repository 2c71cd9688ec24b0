"""Writes Megatron-Energon's metadata while shards are written, so that Energon needs no preparation of its own.

``.nv-meta`` gets the counts of samples (``.info.json``, and ``.info.yaml`` for versions before 7), ``split.yaml``,
``dataset.yaml`` (samples as they are stored; a cooker of the user's makes of them what a model reads) and the index
``index.sqlite``; beside each shard stands ``.tar.idx`` with the offsets of its samples.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import yaml

from prism_megatron.data.formats.energon import META
from prism_megatron.data.formats.write.shards import WrittenSample

_TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
    byte_offset INTEGER, byte_size INTEGER
);
CREATE TABLE sample_parts (
    tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER, content_byte_size INTEGER
);
"""
_INDICES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(
    tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size
);
"""
_DATASET = {
    "__module__": "megatron.energon",
    "__class__": "CrudeWebdataset",
    "subflavors": {"prism_megatron": "messages"},
}


class EnergonWriter:
    """Notes every sample of every shard; ``close`` when the last one was written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / META).mkdir()
        self._database = sqlite3.connect(folder / META / "index.sqlite", isolation_level=None)
        self._database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
        self._database.execute("BEGIN")
        self._numbers: dict[str, int] = {}
        self._offsets: dict[str, tuple[BinaryIO, WrittenSample]] = {}
        self._counts: dict[str, int] = {}

    def add(self, shard: str, sample: WrittenSample, *, part: str) -> None:
        """``shard`` is the tar's path below the folder, ``part`` the part of the split whose shard under way it is."""
        if shard not in self._numbers:
            self._numbers[shard], self._counts[shard] = len(self._numbers), 0
            self._end_offsets(part)
            self._offsets[part] = ((self._folder / shard).with_suffix(".tar.idx").open("wb"), sample)
        number, index = self._numbers[shard], self._counts[shard]
        self._counts[shard] += 1
        file, _ = self._offsets[part]
        file.write(struct.pack("<Q", sample.start))
        self._offsets[part] = file, sample
        self._database.execute(
            "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
            (number, sample.key, index, sample.start, sample.end - sample.start),
        )
        self._database.executemany(
            "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
            [(number, index, one.name, one.offset, one.size) for one in sample.parts],
        )

    def close(self, parts: Mapping[str, Mapping[str, int]]) -> None:
        """``parts`` are the split's, each with the samples of its shards by their paths."""
        for part in list(self._offsets):
            self._end_offsets(part)
        self._database.execute("COMMIT")
        self._database.executescript(_INDICES)
        self._database.close()
        meta = self._folder / META
        (meta / "index.uuid").write_text(str(uuid.uuid4()))
        counts = {name: self._counts[name] for name in self._numbers}
        info = {"energon_version": None, "shard_counts": counts}
        (meta / ".info.json").write_text(json.dumps(info, indent=2))
        _write_yaml(meta / ".info.yaml", info)
        split = {part: list(shards) for part, shards in parts.items()}
        _write_yaml(meta / "split.yaml", {"split_parts": split, "exclude": []})
        _write_yaml(meta / "dataset.yaml", _DATASET)

    def abandon(self) -> None:
        """Let go of the files without finishing them."""
        for file, _ in self._offsets.values():
            file.close()
        self._database.close()

    def _end_offsets(self, part: str) -> None:
        """The list of a shard's offsets ends with that behind its last sample."""
        if part in self._offsets:
            file, last = self._offsets.pop(part)
            file.write(struct.pack("<Q", last.end))
            file.close()


def _write_yaml(path: Path, value: object) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
