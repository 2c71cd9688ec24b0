"""Rectangles of tensors: where two of them meet, and which ones a stretch of a flattened tensor is made of."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from prism_megatron.conversion.ops import Box


def intersection(first: Box, second: Box) -> Box | None:
    """What lies in both, or None where that is nothing."""
    offset = tuple(map(max, first.offset, second.offset))
    ends = [min(a + m, b + n) for a, m, b, n in zip(*first, *second, strict=True)]
    size = tuple(end - begin for begin, end in zip(offset, ends, strict=True))
    return Box(offset, size) if all(count > 0 for count in size) else None


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes that hold elements ``start`` to ``stop`` of a row-major tensor, in that order.

    Each is one stretch of the flattened tensor, and there are at most ``2 * len(shape) - 1``. For a matrix: the end of
    a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = prod(shape[1:])
    row = start // inner
    if begin := start % inner:
        end = min(stop, (row + 1) * inner)
        for box in boxes_of_range(shape[1:], begin, end - row * inner):
            yield Box((row, *box.offset), (1, *box.size))
        start, row = end, row + 1
    if (whole := (stop - start) // inner) > 0:
        yield Box((row, *(0 for _ in shape[1:])), (whole, *shape[1:]))
        start, row = start + whole * inner, row + whole
    for box in boxes_of_range(shape[1:], 0, stop - start):
        yield Box((row, *box.offset), (1, *box.size))
