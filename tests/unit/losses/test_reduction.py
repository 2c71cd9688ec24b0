"""Masked sums and means over counts that the caller gives."""

from __future__ import annotations

import math

import pytest
import torch

from prism_megatron.losses.reduction import global_mean, masked_sum


def test_nothing_passes_where_the_mask_is_false() -> None:
    """Neither NaN nor a gradient; all-false masks give 0 and a zero gradient."""
    values = torch.tensor([1.5, math.nan, math.inf, 2.0], requires_grad=True)
    total = masked_sum(values, torch.tensor([1, 0, 0, 1]))
    total.backward()
    assert total.item() == 3.5
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.0, 1.0]
    values.grad = None
    nothing = masked_sum(values, torch.zeros(4))
    nothing.backward()
    assert nothing.item() == 0.0
    assert values.grad.tolist() == [0.0] * 4  # type: ignore[attr-defined]  # set by backward


def test_the_denominator_is_the_callers() -> None:
    """Not the count of the mask, which is this micro-batch's; nothing anywhere gives 0."""
    values, mask = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([True, True, False])
    assert global_mean(values, mask, denominator=16.0).item() == 0.5
    assert global_mean(values, torch.zeros(3), denominator=0.0).item() == 0.0


def test_shapes_and_counts_that_cannot_be_are_refused() -> None:
    """A mask that would broadcast counts elements twice."""
    with pytest.raises(ValueError, match="shape"):
        masked_sum(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="negative"):
        global_mean(torch.ones(2), torch.ones(2), denominator=-1.0)
