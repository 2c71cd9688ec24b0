"""Masked sums over global denominators.

Every loss of this package is a sum over local elements divided by a count over the *whole* step, so micro-batches
and data-parallel ranks simply add and no split of a batch changes a gradient.
"""

from __future__ import annotations

from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``values`` where ``mask`` is true (scalar); elsewhere neither value nor gradient passes, NaN included.

    Both tensors have the same shape. With an all-false mask the result is 0 and still part of the graph, so a rank
    without data runs the same backward, and the same collectives, as the others.
    Raises ValueError for a mask of another shape.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values have shape {tuple(values.shape)}, mask {tuple(mask.shape)}")
    return values.masked_fill(~mask.bool(), 0.0).sum()


def global_mean(values: Tensor, mask: Tensor, *, denominator: float) -> Tensor:
    """This rank's share of a mean over the whole step: masked sum / ``denominator`` (scalar).

    ``denominator`` counts the elements of all micro-batches and ranks. Zero is allowed when no element exists
    anywhere: the result is 0. Raises ValueError for a negative count.
    """
    if denominator < 0:
        raise ValueError(f"a global count cannot be negative, got {denominator}")
    return masked_sum(values, mask) / max(denominator, 1.0)
