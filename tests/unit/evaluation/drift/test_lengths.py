"""Length matching: what is kept, and that length alone no longer tells two sets apart."""

from __future__ import annotations

import numpy as np

from prism_megatron.evaluation.drift.compare import Measured, Plan, compare
from prism_megatron.evaluation.drift.lengths import TOLERANCE, length_bin, matched
from prism_megatron.evaluation.drift.relabelling import independent, paired
from tests.unit.evaluation.drift.made_up import reasonings, words_at_random

PLAN = Plan(permutations=199)
VOCABULARY = [f"word{number}" for number in range(300)]


def test_bins_hold_lengths_within_a_tenth() -> None:
    """Short lengths are alone; no bin above 10 words has two lengths that are further apart than the tolerance."""
    assert [length_bin(words) for words in range(12)] == list(range(12))
    by_bin: dict[int, list[int]] = {}
    for words in range(1, 2000):
        by_bin.setdefault(length_bin(words), []).append(words)
    assert all(max(own) - min(own) <= TOLERANCE * max(own) for own in by_bin.values())


def test_independent_samples_keep_as_many_of_each_bin() -> None:
    words = [5, 5, 5, 40, 41, 90, 5, 40, 40, 43, 200]
    kept, samples = matched(independent(6, 5), words, seed=0)
    bins = [length_bin(words[number]) for number in kept]
    assert samples.block_N.tolist() == bins
    assert not samples.paired
    for one in set(bins):
        here = samples.block_N == one
        assert 2 * samples.is_first_N[here].sum() == here.sum()
    assert sorted(bins) == sorted([5, 5] + [length_bin(40)] * 4)
    assert set(kept) & {5, 10} == set(), "a length that one side has alone is left out"


def test_pairs_are_kept_whole() -> None:
    """Those within a tenth of the longer one: 90 and 100 are, 89 and 100 are not."""
    kept, samples = matched(paired(4), [90, 89, 3, 0, 100, 100, 3, 1], seed=0)
    assert kept.tolist() == [0, 2, 4, 6]
    assert samples.paired and samples.num_first == samples.num_second == 2
    assert samples.block_N.tolist() == [0, 2, 0, 2]


def _of(found: list[Measured], kind: str) -> Measured:
    (one,) = (one for one in found if one.what == "reasoning" and one.kind == kind)
    return one


def _texts(draw: np.random.Generator, shortest: int, longest: int) -> list[str]:
    lengths = draw.integers(shortest, longest + 1, size=300)
    return [" ".join(draw.choice(VOCABULARY, size=length)) for length in lengths]


def test_sets_that_differ_in_length_alone_are_near_at_equal_lengths() -> None:
    """Claim: the same words in texts of 5 to 40 and of 20 to 80: far apart as they are, not so at equal lengths.

    And sets that differ in words too stay apart, so that the second half is no want of power.
    """
    draw = np.random.default_rng(11)
    short, long = _texts(draw, 5, 40), _texts(draw, 20, 80)
    found = compare(reasonings("a", short), reasonings("b", long, first_id=1000), words_at_random, PLAN)
    as_they_are, same_length = _of(found, "mmd2"), _of(found, "mmd2_same_length")
    assert as_they_are.distance is not None and same_length.distance is not None
    assert as_they_are.distance.p == 1 / 200
    assert same_length.distance.p > 0.05
    assert abs(same_length.distance.value) < 0.1 * as_they_are.distance.value
    assert same_length.num_first == same_length.num_second > 50
    assert abs((same_length.first_mean or 0) - (same_length.second_mean or 0)) < 1.0

    other_words = [text.replace("word1", "term1") for text in long]
    found = compare(reasonings("a", short), reasonings("b", other_words, first_id=1000), words_at_random, PLAN)
    apart = _of(found, "mmd2_same_length")
    assert apart.distance is not None and apart.distance.p == 1 / 200
