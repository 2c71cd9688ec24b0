"""Distances beside slow twins, by hand, and over all relabellings."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.evaluation import proxies
from prism_megatron.evaluation.drift.distances import categories, jensen_shannon, mmd2, rbf_kernel, wasserstein_1
from prism_megatron.evaluation.drift.relabelling import Array, TwoSamples, independent, paired

counts = st.lists(st.integers(-5, 30), min_size=1, max_size=12)


def _twin(first: Array, second: Array, *, pairs: bool) -> float:
    """Equations 3 and 4 of Gretton et al. 2012 as they are written, one term at a time."""
    members = [*first, *second]
    apart = sorted(math.dist(a, b) for a, b in combinations(members, 2))
    middle = len(apart) // 2
    sigma = apart[middle] if len(apart) % 2 else math.sqrt((apart[middle - 1] ** 2 + apart[middle] ** 2) / 2)

    def k(a: Array, b: Array) -> float:
        return math.exp(-(math.dist(a, b) ** 2) / (2 * sigma**2))

    m, n = len(first), len(second)
    if pairs:
        total = 0.0
        for i, j in product(range(m), repeat=2):
            if i != j:
                total += k(first[i], first[j]) + k(second[i], second[j])
                total -= k(first[i], second[j]) + k(first[j], second[i])
        return total / (m * (m - 1))
    within_first = sum(k(first[i], first[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_second = sum(k(second[i], second[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_first + within_second - 2 * sum(k(a, b) for a in first for b in second) / (m * n)


@pytest.mark.parametrize("seed", range(5))
def test_discrepancies_equal_their_slow_twins(seed: int) -> None:
    """Within 1e-12, for the samples as they are and for each relabelling."""
    draw = np.random.default_rng(seed)
    points = np.concatenate([draw.normal(size=(7, 3)), 0.5 + draw.normal(size=(9, 3))])
    samples = independent(7, 9)
    labels = samples.relabelled(20, seed=seed)
    expected = [_twin(points[row == 1], points[row == 0], pairs=False) for row in labels]
    assert mmd2(points, labels, samples) == pytest.approx(expected, abs=1e-12)

    points = np.concatenate([points[:8], points[:8] + 0.2 * draw.normal(size=(8, 3)) + 0.1])
    samples = paired(8)
    labels = samples.relabelled(20, seed=seed)
    for row, found in zip(labels, mmd2(points, labels, samples), strict=True):
        swapped = row[:8] == 0
        first = np.where(swapped[:, None], points[8:], points[:8])
        second = np.where(swapped[:, None], points[:8], points[8:])
        assert found == pytest.approx(_twin(first, second, pairs=True), abs=1e-12)


def _all_relabellings(samples: TwoSamples) -> Array:
    half = samples.num_first
    if samples.paired:
        return np.array([[*way, *(1 - one for one in way)] for way in product((0.0, 1.0), repeat=half)])
    rows = []
    for chosen in combinations(range(len(samples.is_first_N)), half):
        row = np.zeros(len(samples.is_first_N))
        row[list(chosen)] = 1
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("samples", [independent(3, 5), independent(4, 4), paired(5)])
def test_it_is_unbiased(samples: TwoSamples) -> None:
    """Claim: over all relabellings, which are equally likely where nothing differs, the mean is 0 within 1e-12.

    Since the bandwidth is the same for all of them, this holds for whatever points.
    """
    points = np.random.default_rng(1).exponential(size=(len(samples.is_first_N), 2))
    found = mmd2(points, _all_relabellings(samples), samples)
    assert found.mean() == pytest.approx(0.0, abs=1e-12)
    assert found.std() > 1e-3


def test_the_bandwidth_is_the_median_distance() -> None:
    """By hand: 0, 1 and 3 on a line lie 1, 2 and 3 apart, so that σ is 2."""
    kernel = rbf_kernel(np.array([[0.0], [1.0], [3.0]]))
    assert kernel[0, 1] == pytest.approx(math.exp(-1 / 8), abs=1e-15)
    assert kernel[0, 2] == pytest.approx(math.exp(-9 / 8), abs=1e-15)
    assert np.diag(kernel).tolist() == [1, 1, 1]
    assert rbf_kernel(np.array([[1.5, 2.0]] * 3)).tolist() == [[1.0] * 3] * 3
    mostly_equal = rbf_kernel(np.array([[0.1]] * 5 + [[2.1]]))
    assert mostly_equal[0, 5] == pytest.approx(math.exp(-1 / 2), abs=1e-12), "the median of those that are apart"
    assert mostly_equal[0, 1] == 1.0


@settings(max_examples=100, deadline=None)
@given(counts, counts)
def test_wasserstein_equals_that_of_training(a: list[int], b: list[int]) -> None:
    """Within 1e-12, which has twins of its own."""
    values, samples = np.array([*a, *b], dtype=np.float64), independent(len(a), len(b))
    labels = samples.relabelled(3, seed=0)
    expected = [proxies.wasserstein_1(values[row == 1].tolist(), values[row == 0].tolist()) for row in labels]
    assert wasserstein_1(values, labels) == pytest.approx(expected, abs=1e-12)


def test_distances_by_hand() -> None:
    """{0, 0, 1, 1} against {0, 0, 0, 0}: 0.5 apart, and the root of 0.311278 bits; disjoint ones have one bit."""
    labels = np.array([[1.0] * 4 + [0.0] * 4])
    values = np.array([0.0, 0, 1, 1, 0, 0, 0, 0])
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert wasserstein_1(values, labels) == pytest.approx([0.5], abs=1e-15)
    assert jensen_shannon(values, labels) == pytest.approx([math.sqrt(bits)], abs=1e-12)
    disjoint = np.array([0.0, 1, 2, 3, 10, 11, 12, 13])
    assert jensen_shannon(disjoint, labels) == pytest.approx([1.0], abs=1e-12)
    assert wasserstein_1(disjoint, labels) == pytest.approx([10.0], abs=1e-12)
    same = np.array([0.0, 1, 2, 3, 3, 2, 1, 0])
    assert jensen_shannon(same, labels) == pytest.approx([0.0], abs=1e-9)
    assert wasserstein_1(same, labels) == pytest.approx([0.0], abs=1e-12)


def test_many_values_are_put_into_bins_of_equal_shares() -> None:
    """32 different values are 32 categories; of 320 each of the 16 bins has 20; order is kept."""
    assert categories(np.arange(32.0)).tolist() == list(range(32))
    found = categories(np.arange(320.0))
    assert np.bincount(found).tolist() == [20] * 16
    assert (np.diff(found) >= 0).all()
