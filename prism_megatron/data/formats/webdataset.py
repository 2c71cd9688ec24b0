"""WebDataset shards: tars in which files of one name, up to its first dot, make a sample.

A sample is ``KEY.json`` with its images beside it, ``KEY.png`` or ``KEY.0.jpg``, ``KEY.1.jpg`` … The JSON holds what a
line of ``sharegpt`` or ``columns`` does, or the bare list of messages.

Example: ``000007.json`` with ``{"messages": [{"role": "user", "content": "<image>How many circles?"}, {"role":
"assistant", "content": "Two."}]}``, and ``000007.png``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_megatron.data.conversation import Conversation, Picture
from prism_megatron.data.formats import columns, sharegpt
from prism_megatron.data.formats.energon import EnergonMeta
from prism_megatron.data.formats.files.base import ByteReader, Place
from prism_megatron.data.formats.files.reading import Reading, object_in, row_of
from prism_megatron.data.formats.files.tar_members import Member, members_of
from prism_megatron.data.formats.pictures import EXTENSIONS
from prism_megatron.data.formats.rows import inside
from prism_megatron.errors import DataError

_KEY = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")
_ABOUT = re.compile(r"__[^/]*__(/|$)")


@dataclass(frozen=True)
class ShardCorpus:
    """A tar, or a folder of them; with Energon's metadata, the shards of one part of its split."""

    name: str
    path: Path
    reading: Reading
    reader: ByteReader = field(default_factory=ByteReader, compare=False, repr=False)

    @property
    def settings(self) -> str:
        """With the samples that Energon's metadata excludes, which no shard tells. Raises DataError."""
        excluded = " ".join(EnergonMeta(self.path).excludes) if self.name == "energon" else ""
        return self.reading.settings + excluded

    def shards(self) -> tuple[Path, ...]:
        """Raises DataError if there are none, or where Energon's metadata names one that is not there."""
        if self.name == "energon":
            return EnergonMeta(self.path).shards(self.reading.config.split)
        if self.path.is_file():
            return (self.path,)
        found = tuple(sorted(inside(self.path, self.path.rglob("*.tar"))))
        if not found:
            raise DataError(f"{self.path} holds no file that ends in .tar; compressed shards have to be unpacked")
        return found

    def scan(self, shard: Path) -> Iterator[Place]:
        """Every sample that Energon's metadata does not exclude. Raises DataError for a shard that is damaged."""
        excluded = EnergonMeta(self.path).excluded(shard) if self.name == "energon" else frozenset()
        number, start, end, key = 0, 0, 0, ""
        for member, of in _parts_of(shard):
            if of != key and key:
                number += 1
                if key not in excluded:
                    yield Place(start, end - start, number)
            if of != key:
                start, key = member.start, of
            end = member.end
        if key and key not in excluded:
            yield Place(start, end - start, number + 1)

    def read(self, shard: Path, place: Place) -> Conversation:
        """Raises DataError for a malformed sample."""
        where, data = place.of(shard), self.reader.read(shard, place)
        parts: dict[str, bytes] = {}
        key = ""
        cut_out = members_of(lambda offset, count: data[offset : offset + count], len(data), where, is_whole=False)
        for member in cut_out:
            named = _KEY.fullmatch(member.name)
            if named is None:
                continue
            key, part = named[1], named[2].lower()
            if not member.is_file:
                raise DataError(f"{where}: {member.name} is a link or a device; put the file itself into the shard")
            if part in parts:
                raise DataError(f"{where}: {member.name} stands twice in the sample")
            parts[part] = data[member.offset : member.offset + member.size]
        return self._conversation(key, parts, where)

    def _conversation(self, key: str, parts: dict[str, bytes], where: str) -> Conversation:
        if "json" not in parts:
            raise DataError(f"{where}: sample {key} has no {key}.json; it has {', '.join(parts)}")
        value = object_in(parts["json"], where)
        row: dict[str, Any] = {"messages": value} if isinstance(value, list) else dict(row_of(value, where))
        if row.get("id") is None:
            row["id"] = key
        pictures = _pictures(row.get("images"), parts, where)
        is_chat = any(name in row for name in columns.NAMES["messages"])
        parse = sharegpt.parse if is_chat else columns.parse
        return parse(row, where=where, reading=self.reading, pictures=pictures)


def _parts_of(shard: Path) -> Iterator[tuple[Member, str]]:
    """Members that belong to a sample, with its key. Raises DataError."""
    try:
        with shard.open("rb") as file:
            handle = file.fileno()
            total = os.fstat(handle).st_size
            for member in members_of(lambda offset, count: os.pread(handle, count, offset), total, str(shard)):
                named = _KEY.fullmatch(member.name)
                if named is not None and not _ABOUT.match(member.name):
                    yield member, named[1]
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from error


def _pictures(named: object, parts: dict[str, bytes], where: str) -> tuple[Picture, ...]:
    """In the order in which the record names its parts, or else in which they stand in the shard."""
    images = {part: data for part, data in parts.items() if part.rpartition(".")[2] in EXTENSIONS}
    wanted = [name.lower() for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if any(name in images for name in wanted):
        lost = [name for name in wanted if name not in images]
        if lost:
            raise DataError(f"{where}: field images: {', '.join(lost)} not in the sample, which has {', '.join(parts)}")
        return tuple(Picture(images[name]) for name in wanted)
    for name, data in images.items():
        if not data:
            raise DataError(f"{where}: field images: {name} is empty")
    return tuple(Picture(data) for data in images.values())
