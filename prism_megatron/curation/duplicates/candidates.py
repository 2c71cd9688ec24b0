"""All pairs of perceptual hashes that differ in few bits: exactly, by trying every pair, a tile at a time.

A tile of 64 × 4,096 hashes takes 2 MB, so that what is worked out of it stays in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Rows and columns of pairs, in order."""

ROWS, COLUMNS = 64, 4096


def tiles(count: int, *, size: int) -> Iterator[slice]:
    """``count`` things in pieces of ``size``; the last may be shorter."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


def near_pairs(
    one_N: npt.NDArray[np.uint64], other_M: npt.NDArray[np.uint64], distance: int
) -> Iterator[tuple[Pairs, npt.NDArray[np.uint8]]]:
    """All (n, m) whose hashes differ in at most ``distance`` bits, with that number: of one tile after another.

    Rows come in order of tiles, and of each row the columns in order.
    """
    for rows in tiles(len(one_N), size=ROWS):
        for columns in tiles(len(other_M), size=COLUMNS):
            bits = np.bitwise_count(one_N[rows, None] ^ other_M[None, columns])
            row, column = np.nonzero(bits <= distance)
            if len(row):
                yield (row + rows.start, column + columns.start), bits[row, column]
