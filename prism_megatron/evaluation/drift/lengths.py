"""Which texts of two samples are as long as one another, so that length alone cannot tell them apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from prism_megatron.evaluation.drift.relabelling import TwoSamples

TOLERANCE = 0.1
"""Lengths of a pair, or of a bin, are within this share of the longer one."""
_EXACT_UP_TO = 10


def length_bin(words: int) -> int:
    """Up to 10 words each length is a bin of its own; from there on each bin's end is 1.1 times its start."""
    if words <= _EXACT_UP_TO:
        return words
    return _EXACT_UP_TO + math.floor(math.log(words / _EXACT_UP_TO) / math.log(1 + TOLERANCE))


def matched(samples: TwoSamples, words_N: Sequence[int], *, seed: int) -> tuple[npt.NDArray[np.int64], TwoSamples]:
    """Numbers of the members that are kept, and these as two samples of equally many.

    Of pairs those are kept whose lengths differ by at most a tenth of the longer one. Of independent samples equally
    many are drawn from each bin of lengths, and labels are exchanged inside bins alone.
    """
    if samples.paired:
        half = samples.num_first
        near = [
            i for i in range(half)
            if abs(words_N[i] - words_N[half + i]) <= TOLERANCE * max(words_N[i], words_N[half + i])
        ]  # fmt: skip
        kept_N = np.array([*near, *(half + i for i in near)], dtype=np.int64)
        return kept_N, TwoSamples(samples.is_first_N[kept_N], samples.block_N[kept_N], paired=True)
    generator = np.random.default_rng(seed)
    bins: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for number, words in enumerate(words_N):
        bins[length_bin(words)][0 if samples.is_first_N[number] else 1].append(number)
    kept: list[int] = []
    for _, sides in sorted(bins.items()):
        take = min(map(len, sides))
        kept += [int(one) for side in sides for one in generator.permutation(side)[:take]]
    kept_N = np.sort(np.array(kept, dtype=np.int64))
    block_N = np.array([length_bin(words_N[number]) for number in kept_N], dtype=np.int64)
    return kept_N, replace(samples, is_first_N=samples.is_first_N[kept_N], block_N=block_N)
