"""Bands of MinHash signatures: texts that are much alike have one in common, others hardly ever do.

A signature has 128 values, of which two texts share each with a probability that is the Jaccard index of their
shingles. It is cut into bands, and of each band only 32 bits are kept. Two texts of index s share a band of r values
with the probability 1 − (1 − s^r)^b, for b bands.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from prism_megatron.curation.duplicates.words import Shingles

PERMUTATIONS = 128
_MOST_VALUES = 8
_MISSED = 0.01
BYTES_OF_A_BAND = 4


def values_of_a_band(overlap: float) -> int:
    """The longest bands by which at most one in a hundred pairs of texts of this index is missed."""
    for values in range(_MOST_VALUES, 1, -1):
        if (1 - overlap**values) ** (PERMUTATIONS // values) <= _MISSED:
            return values
    return 1


def number_of_bands(values: int) -> int:
    """How many bands of so many values a signature has."""
    return PERMUTATIONS // values


def bands_of(shingles: Shingles, values: int) -> bytes:
    """All bands of a text, of ``BYTES_OF_A_BAND`` each."""
    signature = _empty_signature().copy()
    signature.update_batch([" ".join(one).encode("utf-8", errors="surrogatepass") for one in sorted(shingles)])
    hashed = np.asarray(signature.hashvalues, dtype=np.uint64)
    return b"".join(
        hashlib.blake2b(hashed[start : start + values].tobytes(), digest_size=BYTES_OF_A_BAND).digest()
        for start in range(0, values * number_of_bands(values), values)
    )


def share_a_band(one_P_B: npt.NDArray[np.uint32], other_P_B: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Of each of P pairs, whether any of B bands is the same."""
    return np.asarray((one_P_B == other_P_B).any(axis=1))


def band_pairs(
    one_N_B: npt.NDArray[np.uint32], other_M_B: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All (n, m) whose texts share a band, each once, in order; by sorting, and not by trying every pair."""
    found = np.zeros(0, dtype=np.int64)
    for own, others in zip(one_N_B.T, other_M_B.T, strict=True):
        order = np.argsort(others, kind="stable")
        ordered = others[order]
        first, behind = (np.searchsorted(ordered, own, side=side) for side in ("left", "right"))
        count = behind - first
        rows = np.repeat(np.arange(len(own)), count)
        # Within its run, each match is so many places behind the first one.
        places = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        columns = order[np.repeat(first, count) + places]
        found = np.union1d(found, rows * len(others) + columns)
    return found // max(1, len(other_M_B)), found % max(1, len(other_M_B))


@cache
def _empty_signature() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1, scheme="affine32")
