"""The samples that a run may draw, of all its sets: numbers from 0, with their lengths and sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_megatron.data.formats.files.base import Corpus
from prism_megatron.data.index.index import Index
from prism_megatron.data.records import Part
from prism_megatron.errors import DataError


@dataclass(frozen=True)
class IndexedCorpus:
    """A set and where its records are. Can be sent to worker processes at no cost."""

    corpus: Corpus
    index: Index


@dataclass(frozen=True)
class SampleCounts:
    """What became of the records of all sets; together with ``kept`` they are all that there are."""

    kept: int
    bad: int
    other_part: int
    too_long: int


@dataclass(frozen=True, eq=False)
class Samples:
    """Columns over the samples of one part. About 20 bytes a sample."""

    sets: tuple[IndexedCorpus, ...]
    set_number: npt.NDArray[np.int16]
    row: npt.NDArray[np.int32]
    """of the set's index"""
    text_tokens: npt.NDArray[np.int32]
    visual_tokens: npt.NDArray[np.int32]
    label_tokens: npt.NDArray[np.int32]
    source: npt.NDArray[np.int32]
    """number in ``sources``"""
    sources: tuple[str, ...]
    counts: SampleCounts

    def __len__(self) -> int:
        return len(self.row)

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Lengths of the rendered sequences."""
        return self.text_tokens.astype(np.int64) + self.visual_tokens.astype(np.int64)

    def where(self, sample: int) -> str:
        """``file:number``, by which messages name it."""
        return self.sets[int(self.set_number[sample])].index.where(int(self.row[sample]))

    @property
    def digest(self) -> str:
        """Hash of the samples' texts and lengths in their order. Blind to where files lie, and to pixels."""
        digest = hashlib.sha256()
        for column in (self.text_tokens, self.visual_tokens, self.label_tokens, self.source):
            digest.update(np.ascontiguousarray(column).data)
        for number, one in enumerate(self.sets):
            digest.update(one.index.column("content")[self.row[self.set_number == number]].data)
        for name in self.sources:
            digest.update(f"{len(name)} {name}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def samples_of(sets: Sequence[IndexedCorpus], *, part: Part, max_tokens: int) -> Samples:
    """The records of a part that are at most ``max_tokens`` long, set after set, in their order.

    Raises DataError if there are none.
    """
    kept: list[dict[str, npt.NDArray[Any]]] = []
    numbers: dict[str, int] = {}
    too_long = other_part = 0
    for set_number, index in enumerate(one.index for one in sets):
        of_part = index.column("held_out") == (part == "validation")
        fits = index.column("text_tokens").astype(np.int64) + index.column("visual_tokens") <= max_tokens
        rows = np.flatnonzero(of_part & fits)
        other_part += int(np.count_nonzero(~of_part))
        too_long += int(np.count_nonzero(of_part & ~fits))
        table = np.asarray([numbers.setdefault(name, len(numbers)) for name in index.sources], dtype=np.int32)
        lengths = {name: index.column(name)[rows] for name in ("text_tokens", "visual_tokens", "label_tokens")}
        kept.append(
            {
                "set_number": np.full(len(rows), set_number, dtype=np.int16),
                "row": rows.astype(np.int32),
                "source": table[index.column("source")[rows]],
                **lengths,
            }
        )
    columns = {name: np.concatenate([one[name] for one in kept]) for name in kept[0]}
    bad = sum(one.index.num_bad for one in sets)
    if not len(columns["row"]):
        raise DataError(
            f"no record of the {part} part can be used: {too_long} have more than {max_tokens} tokens, {other_part} "
            f"belong to the other part, {bad} are bad"
        )
    counts = SampleCounts(len(columns["row"]), bad, other_part, too_long)
    return Samples(tuple(sets), sources=tuple(numbers), counts=counts, **columns)


def repeats_by_weight(samples: Samples, weights: Mapping[str, float]) -> dict[str, float]:
    """How often each source is seen in an epoch for its share of the samples to be as its weight, of all weights.

    An epoch keeps its size: as many samples as there are. Raises DataError as ``Mixture``.
    """
    counts = dict(zip(samples.sources, np.bincount(samples.source, minlength=len(samples.sources)), strict=True))
    unknown = [name for name in weights if not counts.get(name)]
    if unknown:
        raise DataError(f"no sample has the source {unknown[0]!r}; there are {', '.join(samples.sources)}")
    whole = sum(weights.values())
    return {
        name: float(weights.get(name, 0.0) / whole * len(samples) / count) for name, count in counts.items() if count
    }
