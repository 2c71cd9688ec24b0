"""Finds ids, and whole records, that a set holds more than once, in 32 bytes a record."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator

import numpy as np

from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.files.reading import content_digest


class Repeats:
    """Keeps 64-bit hashes: that two of a million unequal ids have the same one is as likely as 1 in 37 million."""

    def __init__(self) -> None:
        self._ids = array("Q")
        self._contents = array("Q")
        self._shards: dict[str, int] = {}
        self._shard_numbers = array("L")
        self._numbers = array("L")

    def add(self, conversation: Conversation, where: str) -> None:
        """``where`` is ``shard:number``."""
        shard, _, number = where.rpartition(":")
        self._shard_numbers.append(self._shards.setdefault(shard, len(self._shards)))
        self._numbers.append(int(number))
        self._ids.append(id_hash(conversation.id))
        self._contents.append(int.from_bytes(content_digest(conversation.turns)[:8], "little"))

    def ids(self) -> Iterator[tuple[str, str]]:
        """(where, where its id was used before), in the set's order."""
        return self._pairs(self._ids)

    def contents(self) -> Iterator[tuple[str, str]]:
        """(where, where the same turns with the same images were before), in the set's order."""
        return self._pairs(self._contents)

    def _pairs(self, hashes: array[int]) -> Iterator[tuple[str, str]]:
        values = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.zeros(0, dtype=np.uint64)
        order = np.argsort(values, kind="stable")
        is_repeat = np.flatnonzero(values[order][1:] == values[order][:-1]) + 1
        firsts: dict[int, int] = {}
        for position in is_repeat.tolist():
            before, here = int(order[position - 1]), int(order[position])
            firsts[here] = firsts.get(before, before)
        for here in sorted(firsts):
            yield self._where(here), self._where(firsts[here])

    def _where(self, record: int) -> str:
        shards = list(self._shards)
        return f"{shards[self._shard_numbers[record]]}:{self._numbers[record]}"


def id_hash(id: str) -> int:  # noqa: A002 the field's name
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(id.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
