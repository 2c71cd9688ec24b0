"""Writes conversations as WebDataset shards: ``shards/shard_000000.tar`` with ``KEY.json`` and ``KEY.png`` in it."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from prism_megatron.data.conversation import Conversation, Turn
from prism_megatron.data.formats.pictures import data_of, extension_of
from prism_megatron.data.formats.turns import PLACEHOLDER


@dataclass
class WrittenPart:
    """One file of a sample; offset and size are those of its bytes in the shard."""

    name: str
    offset: int
    size: int


@dataclass
class WrittenSample:
    """``start`` and ``end`` are offsets in the shard, headers and padding included."""

    key: str
    start: int
    end: int
    parts: list[WrittenPart] = field(default_factory=list)


class ShardWriter:
    """Adds records to the shards of one part of a set; ``close`` when the last one was added."""

    def __init__(self, folder: Path, *, name: str, records_per_shard: int) -> None:
        """``name`` begins the files' names; keys of samples do, too, so that they differ between parts."""
        self._folder = folder
        self._name = name
        self._records_per_shard = records_per_shard
        self._count = 0
        self._tar: BinaryIO | None = None
        self._shard = ""
        self.counts: dict[str, int] = {}
        """samples of every shard, by its path below ``folder``"""

    def add(self, conversation: Conversation, *, where: str) -> tuple[str, WrittenSample]:
        """Returns the shard's name and the sample in it. Raises DataError, naming ``where``, for no image."""
        key = f"{self._name}{self._count:09d}"
        pictures = conversation.pictures
        images = [(extension_of(one, where=where), data_of(one, where=where)) for one in pictures]
        names = [extension if len(images) == 1 else f"{i}.{extension}" for i, (extension, _) in enumerate(images)]
        about = json.dumps(_about(conversation, names), ensure_ascii=False).encode("utf-8")
        if self._count % self._records_per_shard == 0:
            self._next_shard()
        self._count += 1
        assert self._tar is not None
        sample = WrittenSample(key, start=self._tar.tell(), end=0)
        for part, data in [("json", about), *zip(names, (data for _, data in images), strict=True)]:
            member = tarfile.TarInfo(f"{key}.{part}")
            member.size, member.mode = len(data), 0o644
            self._tar.write(member.tobuf(tarfile.USTAR_FORMAT))
            sample.parts.append(WrittenPart(part, self._tar.tell(), len(data)))
            self._tar.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        sample.end = self._tar.tell()
        self.counts[self._shard] += 1
        return self._shard, sample

    def close(self) -> None:
        if self._tar is not None:
            self._tar.write(bytes(2 * tarfile.BLOCKSIZE))
            self._tar.close()
            self._tar = None

    def _next_shard(self) -> None:
        self.close()
        self._shard = f"shards/{self._name}{len(self.counts):06d}.tar"
        self.counts[self._shard] = 0
        path = self._folder / self._shard
        path.parent.mkdir(exist_ok=True)
        self._tar = path.open("wb")


def _about(conversation: Conversation, names: list[str]) -> dict[str, Any]:
    about: dict[str, Any] = {
        "id": conversation.id,
        "source": conversation.source,
        "messages": [{"role": turn.role, "content": _content(turn)} for turn in conversation.turns],
    }
    if names:
        about["images"] = names
    if conversation.answer is not None:
        about["answer"] = conversation.answer
    return about


def _content(turn: Turn) -> str | list[dict[str, str]]:
    """Text with placeholders; a list of items where text itself holds one, or stands in several pieces."""
    texts = [isinstance(part, str) for part in turn.parts]
    in_pieces = any(one and other for one, other in pairwise(texts))
    if in_pieces or any(isinstance(part, str) and PLACEHOLDER in part for part in turn.parts):
        return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.parts]
    return "".join(part if isinstance(part, str) else PLACEHOLDER for part in turn.parts)
