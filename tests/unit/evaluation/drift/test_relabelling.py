"""Relabellings keep blocks and sizes, and p-values by them are right: found by simulation and by counting."""

from __future__ import annotations

import numpy as np
import pytest

from prism_megatron.evaluation.drift.distances import jensen_shannon, mmd2, wasserstein_1
from prism_megatron.evaluation.drift.lengths import matched
from prism_megatron.evaluation.drift.relabelling import Array, TwoSamples, distance_of, independent, paired

WORLDS, PERMUTATIONS, SIZE = 2000, 99, 0.05
# Of 2,000 worlds 100 are rejected at 5 %, with a standard deviation of 9.7; beyond 3.3 of these lies 1 in 1,000.
FEWEST, MOST = 68, 132


def test_labels_are_exchanged_inside_blocks_alone() -> None:
    """Claim: each block keeps its number of first members; the first row is how it was; seeds decide."""
    samples = TwoSamples(np.array([1, 0, 1, 1, 0, 0, 0, 1, 0], dtype=bool), np.array([2, 7, 7, 2, 2, 0, 7, 7, 0]))
    labels = samples.relabelled(200, seed=3)
    assert labels.shape == (201, 9)
    assert labels[0].tolist() == samples.is_first_N.tolist()
    for block in (0, 2, 7):
        here = samples.block_N == block
        assert (labels[:, here].sum(1) == samples.is_first_N[here].sum()).all()
    assert (labels[:, samples.block_N == 0] == 0).all()
    inside = labels[1:, samples.block_N == 7]
    assert len(np.unique(inside, axis=0)) == 6, "4 members of which 2 are first: 6 ways"
    assert (labels == samples.relabelled(200, seed=3)).all()
    assert (labels[1:] != samples.relabelled(200, seed=4)[1:]).any()


def test_every_relabelling_is_as_likely() -> None:
    """Claim: uniform over the 10 ways of 2 among 5; chi-square of 4,000 draws below its 99.9 % point at 9 degrees."""
    labels = independent(2, 3).relabelled(4000, seed=0)[1:]
    _, counts = np.unique(labels, axis=0, return_counts=True)
    assert len(counts) == 10
    assert ((counts - 400) ** 2 / 400).sum() < 27.9


def test_p_counts_what_was_found_among_the_others() -> None:
    """(1 + as large) / (1 + permutations), ties as large; the mean is of the others alone."""
    found = distance_of(np.array([3.0, 1.0, 3.0, 5.0, 2.0]))
    assert found == (3.0, 2.75, 3 / 5)
    assert distance_of(np.array([9.0, 1.0, 2.0, 3.0])).p == 1 / 4


def _independent(draw: np.random.Generator) -> tuple[Array, TwoSamples]:
    return draw.normal(size=(36, 2)), independent(20, 16)


def _pairs(draw: np.random.Generator) -> tuple[Array, TwoSamples]:
    """Answers to one question are far nearer to one another than to others."""
    questions = draw.normal(size=(18, 2))
    return np.concatenate([questions, questions]) + 0.3 * draw.normal(size=(36, 2)), paired(18)


def _of_two_lengths(draw: np.random.Generator) -> tuple[Array, TwoSamples]:
    """What a member is depends on its length alone, and the first sample is longer."""
    words = np.concatenate([draw.choice([4, 8], p=[0.2, 0.8], size=40), draw.choice([4, 8], p=[0.7, 0.3], size=40)])
    points = words[:, None] + draw.normal(size=(80, 2))
    kept, samples = matched(independent(40, 40), words.tolist(), seed=int(draw.integers(2**31)))
    return points[kept], samples


@pytest.mark.parametrize("world", [_independent, _pairs, _of_two_lengths])
def test_a_true_hypothesis_is_rejected_as_often_as_it_says(world: object) -> None:
    """Claim: at 5 % all three tests reject 5 % of worlds without a difference, within binomial error.

    Discrete statistics (Jensen–Shannon of few categories) may reject less often, never more. Blind spot: power.
    """
    rejected = np.zeros(3)
    for number in range(WORLDS):
        points, samples = world(np.random.default_rng([7, number]))  # type: ignore[operator]
        labels = samples.relabelled(PERMUTATIONS, seed=number)
        values = points[:, 0].copy()
        found = (
            distance_of(mmd2(points, labels, samples)),
            distance_of(wasserstein_1(values, labels)),
            distance_of(jensen_shannon(np.round(values), labels)),
        )
        rejected += [one.p <= SIZE for one in found]
    assert FEWEST <= rejected[0] <= MOST
    assert FEWEST <= rejected[1] <= MOST
    assert rejected[2] <= MOST


def test_lengths_alone_reject_without_matching() -> None:
    """The third world, were its members not matched: the hypothesis is false, and is rejected."""
    draw = np.random.default_rng(5)
    words = np.concatenate([draw.choice([4, 8], p=[0.2, 0.8], size=40), draw.choice([4, 8], p=[0.7, 0.3], size=40)])
    samples = independent(40, 40)
    points = words[:, None] + draw.normal(size=(80, 2))
    assert distance_of(mmd2(points, samples.relabelled(199, seed=0), samples)).p == 1 / 200
