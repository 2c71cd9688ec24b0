"""Three distances of two samples, each for all relabellings at once.

Shape suffixes: N members of both samples, P relabellings, D dimensions, C categories.
"""

from __future__ import annotations

import numpy as np

from prism_megatron.evaluation.drift.relabelling import Array, TwoSamples

MOST_CATEGORIES, NUM_BINS = 32, 16
"""Numbers of more different values than the first are put into so many bins of equal shares of both samples."""


def wasserstein_1(values_N: Array, labels_P_N: Array) -> Array:
    """``[P]``: the area between two distribution functions, as ``evaluation.proxies.wasserstein_1`` finds it."""
    order_N = np.argsort(values_N, kind="stable")
    labels_P_N = labels_P_N[:, order_N]
    first_P_N = np.cumsum(labels_P_N, axis=1)
    second_P_N = np.arange(1, len(values_N) + 1) - first_P_N
    apart_P_N = np.abs(first_P_N / first_P_N[:, -1:] - second_P_N / second_P_N[:, -1:])
    areas_P: Array = apart_P_N[:, :-1] @ np.diff(values_N[order_N])
    return areas_P


def jensen_shannon(values_N: Array, labels_P_N: Array) -> Array:
    """``[P]``: the Jensen–Shannon distance, the root of the divergence in bits: 0 for equal samples, 1 at most.

    Endres and Schindelin 2003. Every value is a category, or bins of values are (``MOST_CATEGORIES``).
    """
    categories_N = categories(values_N)
    present_N_C = np.eye(categories_N.max() + 1)[categories_N]
    first_P_C = labels_P_N @ present_N_C
    second_P_C = present_N_C.sum(0) - first_P_C
    p_P_C, q_P_C = (counts / counts.sum(1, keepdims=True) for counts in (first_P_C, second_P_C))
    middle_P_C = (p_P_C + q_P_C) / 2
    divergence_P = (_relative_entropy(p_P_C, middle_P_C) + _relative_entropy(q_P_C, middle_P_C)) / 2
    distance_P: Array = np.sqrt(np.maximum(divergence_P, 0.0))
    return distance_P


def categories(values_N: Array) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The number of each value's category, from 0 on."""
    values, category_N = np.unique(values_N, return_inverse=True)
    if len(values) <= MOST_CATEGORIES:
        return category_N.astype(np.int64)
    edges = np.unique(np.quantile(values_N, np.arange(1, NUM_BINS) / NUM_BINS))
    return np.searchsorted(edges, values_N, side="right").astype(np.int64)


def _relative_entropy(p_P_C: Array, q_P_C: Array) -> Array:
    """In bits; a category without p counts nothing."""
    ratio_P_C = np.divide(p_P_C, q_P_C, out=np.ones_like(p_P_C), where=p_P_C > 0)
    entropy_P: Array = (p_P_C * np.log2(ratio_P_C)).sum(1)
    return entropy_P


def mmd2(points_N_D: Array, labels_P_N: Array, samples: TwoSamples) -> Array:
    """``[P]``: the unbiased squared maximum mean discrepancy with an RBF kernel; below 0 at times, and 0 on average
    where nothing differs.

    Gretton et al. 2012: equation 3 (lemma 6) for independent samples, equation 4 for paired ones, which leaves out each
    member beside its own partner. The bandwidth is the median distance of two members of either sample, so that it is
    the same for all relabellings.
    """
    kernel_N_N = rbf_kernel(points_N_D)
    np.fill_diagonal(kernel_N_N, 0.0)
    num_first, num_second = samples.num_first, samples.num_second
    crossing = num_first * num_second
    if samples.paired:
        partner_N = np.roll(np.arange(len(points_N_D)), num_first)
        kernel_N_N[np.arange(len(points_N_D)), partner_N] = 0.0
        crossing -= num_first
    sums_N = kernel_N_N.sum(1)
    within_first_P = np.einsum("pn,pn->p", labels_P_N @ kernel_N_N, labels_P_N)
    across_P = labels_P_N @ sums_N - within_first_P
    within_second_P = sums_N.sum() - within_first_P - 2 * across_P
    found_P: Array = (
        within_first_P / (num_first * (num_first - 1))
        + within_second_P / (num_second * (num_second - 1))
        - 2 * across_P / crossing
    )
    return found_P


def rbf_kernel(points_N_D: Array) -> Array:
    """``exp(-d² / 2σ²)``, with σ the median distance of all pairs; where more than half of these are 0, of the others.

    All ones where all points are one.
    """
    squares_N = np.einsum("nd,nd->n", points_N_D, points_N_D)
    squared_N_N = np.maximum(squares_N[:, None] + squares_N[None] - 2 * points_N_D @ points_N_D.T, 0.0)
    squared_N_N[squared_N_N < 1e-12 * max(float(squares_N.max()), 1e-300)] = 0.0  # rounding of equal points
    pairs = squared_N_N[np.triu_indices(len(points_N_D), 1)]
    median = float(np.median(pairs))
    if median == 0.0:
        apart = pairs[pairs > 0]
        if not len(apart):
            return np.ones_like(squared_N_N)
        median = float(np.median(apart))
    kernel_N_N: Array = np.exp(-squared_N_N / (2 * median))
    return kernel_N_N
