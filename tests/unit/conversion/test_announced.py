"""Whoever takes weights knows beforehand which of the model's do not come."""

from __future__ import annotations

import torch

from prism_megatron.conversion.announced_weights import AnnouncedWeights, left_out_of


def test_what_is_left_out_is_announced() -> None:
    """Claim: tensors come as they are given, and what does not come is known; a plain list leaves nothing out."""
    given = [("b", torch.ones(2)), ("a", torch.zeros(1))]
    weights = AnnouncedWeights({"b": (2,), "a": (1,)}, iter(given), left_out={"vision"})
    assert left_out_of(weights) == {"vision"}
    assert list(weights) == given
    assert left_out_of(AnnouncedWeights({}, iter(()))) == left_out_of(given) == frozenset()
