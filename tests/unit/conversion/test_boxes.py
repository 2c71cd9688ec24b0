"""Rectangles of tensors (blind spot: what they are cut for, in ``tests/distributed/test_checkpoint_parts.py``)."""

from __future__ import annotations

import itertools

import pytest
import torch

from prism_megatron.conversion.boxes import boxes_of_range, intersection
from prism_megatron.conversion.ops import Box


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(begin, begin + count) for begin, count in zip(*box, strict=True))]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_of_a_range_are_that_range_in_its_order(shape: tuple[int, ...]) -> None:
    """Claim: for every range, the boxes one after another are the flattened tensor's elements, and as few as said."""
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    flat = tensor.reshape(-1)
    for start, stop in itertools.combinations_with_replacement(range(len(flat) + 1), 2):
        boxes = list(boxes_of_range(shape, start, stop))
        found = [part(tensor, box).reshape(-1) for box in boxes]
        assert torch.equal(torch.cat([flat[:0], *found]), flat[start:stop]), (start, stop)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_an_intersection_is_what_lies_in_both() -> None:
    """Claim: of all pairs of boxes of a small matrix; touching boxes have none."""
    spans = [(begin, end - begin) for begin, end in itertools.combinations(range(4), 2)]
    boxes = [Box((row, column), (height, width)) for (row, height), (column, width) in itertools.product(spans, spans)]
    for one, other in itertools.product(boxes, boxes):
        counts = torch.zeros(3, 3, dtype=torch.int)
        part(counts, one).add_(1)
        part(counts, other).add_(1)
        common = intersection(one, other)
        if common is None:
            assert (counts < 2).all()
        else:
            assert (part(counts, common) == 2).all() and (counts == 2).sum() == part(counts, common).numel() > 0
