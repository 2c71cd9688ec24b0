"""Two samples as one, and all the ways in which their members could have been called first and second.

Shape suffixes: N members of both samples, P relabellings (the first of them is how it was), B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Distance(NamedTuple):
    """A distance, what it comes to on average where members are relabelled, and how often that is as large."""

    value: float
    expected: float
    p: float


@dataclass(frozen=True, eq=False)
class TwoSamples:
    """Which members belong to the first sample, and among which of them labels may be exchanged.

    Under the hypothesis that nothing differs, every relabelling inside blocks is as likely as any other. A block is all
    members for two independent samples, one question for answers to the same questions (``paired``: member i of the
    first sample answers the question of member i of the second), one length for samples that are matched on it.
    """

    is_first_N: npt.NDArray[np.bool_]
    block_N: npt.NDArray[np.int64]
    paired: bool = False

    @property
    def num_first(self) -> int:
        return int(self.is_first_N.sum())

    @property
    def num_second(self) -> int:
        return len(self.is_first_N) - self.num_first

    def relabelled(self, permutations: int, *, seed: int) -> Array:
        """``[1 + permutations, N]``: 1 where a member is called first; row 0 is how it was."""
        keys_P_N = np.random.default_rng(seed).random((permutations, len(self.block_N)))
        by_block_N = np.argsort(self.block_N, kind="stable")
        rank_N = np.unique(self.block_N, return_inverse=True)[1]
        shuffled_P_N = np.argsort(keys_P_N + rank_N, axis=1)  # keys are below 1: blocks stay together
        labels_P_N = np.empty((1 + permutations, len(self.block_N)))
        labels_P_N[0] = self.is_first_N
        labels_P_N[1:, by_block_N] = self.is_first_N[shuffled_P_N]
        return labels_P_N


def independent(num_first: int, num_second: int) -> TwoSamples:
    """Two samples that have nothing to do with one another."""
    is_first_N = np.arange(num_first + num_second) < num_first
    return TwoSamples(is_first_N, np.zeros(len(is_first_N), dtype=np.int64))


def paired(num_pairs: int) -> TwoSamples:
    """Member i of the first sample and member i of the second answer the same question."""
    return TwoSamples(np.arange(2 * num_pairs) < num_pairs, np.tile(np.arange(num_pairs), 2), paired=True)


def distance_of(values_P: Array) -> Distance:
    """The first of the values, beside the others.

    p is (1 + those at least as large) / (1 + permutations), which rejects a true hypothesis at most as often as it says
    (Phipson and Smyth 2010, equation 2). Values that differ by rounding alone count as equal.
    """
    value, others_P = float(values_P[0]), values_P[1:]
    as_large = int((others_P >= value - 1e-12 * max(1.0, abs(value))).sum())
    return Distance(value, float(others_P.mean()), (1 + as_large) / (1 + len(others_P)))
