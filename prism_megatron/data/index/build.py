"""Reads and measures every record of a corpus once, in several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.files.base import Corpus, Place
from prism_megatron.data.index.columns import COLUMNS, BadRecord, Counting
from prism_megatron.data.records import in_part
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.workers import in_workers
from prism_megatron.errors import DataError

CHUNK = 256
"""Records that a worker is given at a time."""
_CHUNKS_AHEAD = 4
"""Of each worker: enough to keep it busy, few enough to hold in memory."""

Places = npt.NDArray[np.int64]
"""[records, 3]: offset, size and number."""
Chunk = tuple[int, Path, Places]
"""Number and path of a shard, and some of its records."""


@dataclass
class Measured:
    """What was found in one chunk. Columns of ``COLUMNS`` but for the shard; sources by their own table."""

    shard: int
    columns: dict[str, list[int]]
    ids: list[int] = field(default_factory=list)
    """hashes of ids, in 64 bits"""
    sources: list[str] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    records: int = 0


@dataclass(frozen=True)
class Built:
    """The columns of an index, their table of sources, and the records that are in none of them."""

    columns: dict[str, npt.NDArray[Any]]
    sources: tuple[str, ...]
    bad: list[BadRecord]


class Measurer:
    """Measures chunks of one corpus; sent to every worker once."""

    def __init__(self, corpus: Corpus, render: ConversationRenderer, *, validation_share: float) -> None:
        self._corpus, self._render, self._share = corpus, render, validation_share

    def __call__(self, chunk: Chunk) -> Measured:
        """The records of a chunk; bad ones are listed."""
        number, shard, places = chunk
        names = [name for name in COLUMNS if name != "shard"]
        found = Measured(number, {name: [] for name in names}, records=len(places))
        codes: dict[str, int] = {}
        for offset, size, count in places.tolist():
            place = Place(offset, size, count)
            try:
                conversation = self._corpus.read(shard, place)
                lengths = self._render.measure(conversation)
                held_out = in_part(conversation, "validation", validation_share=self._share)
            except DataError as error:
                where = place.of(shard)
                reason = str(error) if where in str(error) else f"{where}: {error}"
                found.bad.append(BadRecord(where, reason))
                continue
            code = codes.setdefault(conversation.source, len(codes))
            values = (*place, *lengths, code, held_out, _hash([conversation.id, *_texts(conversation)]))
            for name, value in zip(names, values, strict=True):
                found.columns[name].append(value)
            found.ids.append(_hash([conversation.id]))
        found.sources = list(codes)
        return found


def _texts(conversation: Conversation) -> Iterator[str]:
    for turn in conversation.turns:
        yield turn.role
        for part in turn.parts:
            yield part if isinstance(part, str) else "\0"


def _hash(texts: Sequence[str]) -> int:
    """64 bits of the texts and of where each ends."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def build_columns(
    corpus: Corpus,
    shards: Sequence[Path],
    render: ConversationRenderer,
    *,
    validation_share: float,
    workers: int,
    counting: Counting,
) -> Built:
    """Scan all shards, then measure their records in order. Raises DataError for a shard that cannot be read at all."""
    with counting.task("shards", total=len(shards)) as advance:
        scanned: list[Places] = []
        for shard in shards:
            places: Places = np.fromiter(corpus.scan(shard), dtype=np.dtype((np.int64, 3)))
            scanned.append(places)
            advance(1)
    measure = Measurer(corpus, render, validation_share=validation_share)
    chunks = (
        (number, shard, places[start : start + CHUNK])
        for number, (shard, places) in enumerate(zip(shards, scanned, strict=True))
        for start in range(0, len(places), CHUNK)
    )
    found = []
    with counting.task("records", total=sum(map(len, scanned))) as advance:
        for one in in_workers(measure, chunks, workers=workers, ahead=_CHUNKS_AHEAD):
            found.append(_packed(one))
            advance(one.records)
    return _joined(found, shards)


@dataclass(frozen=True)
class _Packed:
    """A ``Measured`` in arrays."""

    shard: int
    columns: dict[str, npt.NDArray[Any]]
    ids: npt.NDArray[np.int64]
    sources: list[str]
    bad: list[BadRecord]


def _packed(found: Measured) -> _Packed:
    columns = {name: np.asarray(values, dtype=COLUMNS[name]) for name, values in found.columns.items()}
    return _Packed(found.shard, columns, np.asarray(found.ids, dtype=np.int64), found.sources, found.bad)


def _joined(found: Sequence[_Packed], shards: Sequence[Path]) -> Built:
    """All chunks as one table of sources and one array for each column, without records whose id was used before."""
    codes: dict[str, int] = {}
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in COLUMNS}
    for one in found:
        table = np.asarray([codes.setdefault(name, len(codes)) for name in one.sources], dtype=COLUMNS["source"])
        for name in COLUMNS:
            if name == "shard":
                part = np.full(len(one.ids), one.shard, dtype=COLUMNS[name])
            elif name == "source":
                part = table[one.columns[name]]
            else:
                part = one.columns[name]
            parts[name].append(part)
    columns = {
        name: np.concatenate(pieces) if pieces else np.zeros(0, dtype=COLUMNS[name]) for name, pieces in parts.items()
    }
    bad = [record for one in found for record in one.bad]
    ids = np.concatenate([one.ids for one in found]) if found else np.zeros(0, dtype=np.int64)
    repeated = _repeats(columns["shard"], ids)
    for row, first in repeated.items():
        where = Place(0, 0, int(columns["number"][row])).of(shards[columns["shard"][row]])
        bad.append(BadRecord(where, f"{where}: its id was used before, by record {columns['number'][first]}"))
    kept = np.ones(len(ids), dtype=np.bool_)
    kept[list(repeated)] = False
    return Built({name: column[kept] for name, column in columns.items()}, tuple(codes), bad)


def _repeats(shards: npt.NDArray[np.int32], ids: npt.NDArray[np.int64]) -> dict[int, int]:
    """Rows whose id an earlier row of the same shard has, with that row."""
    order = np.lexsort((np.arange(len(ids)), ids, shards))
    same = (np.diff(ids[order]) == 0) & (np.diff(shards[order]) == 0)
    repeats: dict[int, int] = {}
    for position in np.flatnonzero(same).tolist():
        before, row = int(order[position]), int(order[position + 1])
        repeats[row] = repeats.get(before, before)
    return dict(sorted(repeats.items()))
