"""Tells for every problem of a pool whether it is kept: the first of those that are one, and none of an evaluation.

What makes two problems one stands in ``rule.py``. Problems are decided in their order, each against those that were
kept before it, so that of three in a row of which only neighbours are near the first and the third stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from prism_megatron.config.tools.curate import Duplicates
from prism_megatron.curation.duplicates.bands import band_pairs
from prism_megatron.curation.duplicates.candidates import ROWS, Pairs, near_pairs
from prism_megatron.curation.duplicates.hashes import Hashes, Records, hashes_of
from prism_megatron.curation.duplicates.rule import Mask, Numbers, Rule
from prism_megatron.curation.duplicates.scratch import Scratch

Reason = Literal["the same as", "near", "near evaluation record", "an image that cannot be read"]
_REASONS: tuple[Reason, ...] = ("the same as", "near", "near evaluation record", "an image that cannot be read")
_KEPT, _SAME, _NEAR, _EVALUATION, _UNREADABLE = range(5)
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one problem.

    Example: ``Verdict(7, "near", "geometry-12")`` refuses the eighth problem of the pool.
    """

    position: int
    """in the pool, from 0"""
    reason: Reason | None = None
    """why it is refused; None where it is kept"""
    other: str = ""
    """id of the problem that it is near to, or SOURCE/ID of an evaluation record; empty for a bad image"""

    @property
    def kept(self) -> bool:
        return self.reason is None


def deduplicate(
    problems: Records,
    evaluation: Records,
    rules: Duplicates,
    *,
    workers: int,
    folder: Path,
    say: Callable[[str], object],
) -> Iterator[Verdict]:
    """The verdict on every problem, in order; both sets are read twice, and no record is held.

    ``workers`` processes (0: this one) hash texts and pictures. In ``folder`` about 5 kB a picture wait meanwhile, in a
    hidden folder that is removed at the end. Raises ConfigError without the extra ``curate``, DataError, naming the
    record, for a file that cannot be opened and an evaluation's picture that cannot be read, and DiskError.
    """
    with Scratch.inside(folder) as scratch:
        hashes = hashes_of(evaluation, problems, scratch, overlap=rules.text_overlap, workers=workers)
        say(
            f"{len(hashes) - hashes.num_evaluation:,} problems and {hashes.num_evaluation:,} evaluation records with "
            f"{len(hashes.pixels_P):,} pictures are hashed"
        )
        yield from _Search(hashes, scratch, Rule(hashes, scratch, rules)).verdicts()


class _Search:
    """Decides the problems, in blocks of some rows."""

    def __init__(self, hashes: Hashes, scratch: Scratch, rule: Rule) -> None:
        self._hashes, self._scratch, self._rule = hashes, scratch, rule
        self._perceptual = hashes.perceptual_P[hashes.picture_N]
        self._first_same = _first_of_each(hashes)
        unreadable = hashes.unreadable_P[hashes.picture_N]
        self._reason = np.where(unreadable, np.uint8(_UNREADABLE), np.uint8(_KEPT))
        self._other = np.zeros(len(hashes), dtype=np.int32)

    def verdicts(self) -> Iterator[Verdict]:
        """In order."""
        pool = self._hashes.num_evaluation
        for start in range(pool, len(self._hashes), ROWS):
            block = np.arange(start, min(start + ROWS, len(self._hashes)))
            self._refuse_evaluation(block)
            self._refuse_near_earlier(block)
            self._refuse_within(block)
            for number in block.tolist():
                yield self._verdict(number)

    def _refuse_evaluation(self, block: Numbers) -> None:
        """Those that are near an evaluation record, by pictures or by texts."""
        hashes, rule, end = self._hashes, self._rule, self._hashes.num_evaluation
        by_picture = near_pairs(self._perceptual[block], self._perceptual[:end], rule.evaluation_distance)
        for (row, column), _ in by_picture:
            self._refuse_those(block[row], column, rule.gives_picture_away)
        row, column = band_pairs(hashes.bands_N_B[block], hashes.bands_N_B[:end])
        self._refuse_those(block[row], column, rule.gives_text_away)

    def _refuse_those(self, one: Numbers, other: Numbers, judge: Callable[[Numbers, Numbers], Mask]) -> None:
        chosen = self._undecided(one)
        one, other = one[chosen], other[chosen]
        found = judge(one, other)
        self._refuse_first(one[found], other[found], _EVALUATION)

    def _refuse_near_earlier(self, block: Numbers) -> None:
        """Those that are the same as, or near, one that was kept in an earlier block."""
        pool, start = self._hashes.num_evaluation, int(block[0])
        first = self._first_same[block]
        same = self._undecided(block) & (first < start) & (self._reason[first] == _KEPT)
        self._refuse_first(block[same], first[same], _SAME)
        distance = self._rule.same_text_distance
        for (row, column), bits in near_pairs(self._perceptual[block], self._perceptual[pool:start], distance):
            one, other = block[row], column + pool
            chosen = np.flatnonzero(self._undecided(one) & (self._reason[other] == _KEPT))
            near = self._near((one[chosen], other[chosen]), bits[chosen])
            self._refuse_first(one[chosen[near]], other[chosen[near]], _NEAR)

    def _refuse_within(self, block: Numbers) -> None:
        """Those that are one with an earlier one of their own block, which is decided from its first to its last."""
        near: dict[int, list[int]] = {}
        own = self._perceptual[block]
        for (row, column), bits in near_pairs(own, own, self._rule.same_text_distance):
            chosen = np.flatnonzero((column < row) & self._undecided(block[row]))
            one, other = block[row[chosen]], block[column[chosen]]
            found = self._near((one, other), bits[chosen])
            for number, earlier in zip(one[found].tolist(), other[found].tolist(), strict=True):
                near.setdefault(number, []).append(earlier)
        for number in block.tolist():
            first = int(self._first_same[number])
            others = [(first, _SAME)] if first < number else []
            others += [(earlier, _NEAR) for earlier in near.get(number, ())]
            for earlier, reason in others:
                if self._reason[number] == _KEPT == self._reason[earlier]:
                    self._refuse(number, earlier, reason)

    def _near(self, pairs: Pairs, bits: npt.NDArray[np.uint8]) -> Mask:
        one, other = pairs
        found = self._rule.may_be_near(one, other, bits)
        found[found] = self._rule.near(one[found], other[found], bits[found])
        return found

    def _undecided(self, numbers: Numbers) -> Mask:
        return np.asarray(self._reason[numbers] == _KEPT)

    def _refuse_first(self, numbers: Numbers, others: Numbers, reason: int) -> None:
        """Of each number the first of its others counts; one that is refused already stays as it is."""
        for number, other in zip(numbers.tolist(), others.tolist(), strict=True):
            if self._reason[number] == _KEPT:
                self._refuse(number, other, reason)

    def _refuse(self, number: int, other: int, reason: int) -> None:
        self._reason[number], self._other[number] = reason, other

    def _verdict(self, number: int) -> Verdict:
        position, reason = number - self._hashes.num_evaluation, int(self._reason[number])
        if reason == _KEPT:
            return Verdict(position)
        if reason == _UNREADABLE:
            return Verdict(position, _REASONS[reason - 1])
        other = self._scratch.question(int(self._other[number]))
        name = f"{other.source}/{other.id}" if reason == _EVALUATION else other.id
        return Verdict(position, _REASONS[reason - 1], name)


def _first_of_each(hashes: Hashes) -> npt.NDArray[np.int64]:
    """Of every record the first problem with its pixels, text and answer, by 64 bits of all three.

    That two of a million problems have the same bits by chance is as likely as 1 in 37 million.
    """
    pixels = hashes.pixels_P[hashes.picture_N]
    key = pixels ^ (hashes.text_N * _ODD) ^ (hashes.answer_N * _ODD * _ODD)
    pool = hashes.num_evaluation
    _, first, inverse = np.unique(key[pool:], return_index=True, return_inverse=True)
    return np.concatenate([np.arange(pool), first[inverse] + pool])
