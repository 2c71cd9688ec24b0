"""The clipped ratio by hand, and what keeps it finite; ``test_objectives.py`` has the twin."""

from __future__ import annotations

import math

import pytest
import torch

from prism_megatron.losses.policy.clipped import clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "bound"),
    [
        (0.5, 2.0, 1.0, None),
        (1.3, 2.0, 2.6, None),
        (1.5, 2.0, 2.8, "high"),
        (3.0, 2.0, 2.8, "high"),
        (0.85, -2.0, -1.8, "low"),
        (0.95, -2.0, -1.9, None),
        (1.5, -2.0, -3.0, None),
        (3.0, -2.0, -5.0, "dual"),
        (0.5, 0.0, 0.0, None),
        (3.0, 0.0, 0.0, None),
    ],
)
def test_every_bound_has_its_side_and_is_counted_where_it_binds(
    ratio: float, advantage: float, objective: float, bound: str | None
) -> None:
    """Bounds 0.9 and 1.4, and 2.5 times a negative advantage. Where one binds there is no gradient, but a count."""
    logprobs = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    result = clipped(
        logprobs,
        torch.tensor([-1.0], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        clip_low=0.1,
        clip_high=0.4,
        dual_clip=2.5,
    )
    result.objective_n.sum().backward()
    assert result.objective_n.item() == pytest.approx(objective)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0.0 if bound else ratio * advantage)
    counts = {"low": result.low_n, "high": result.high_n, "dual": result.dual_n}
    assert {name: bool(count_n.item()) for name, count_n in counts.items()} == {name: name == bound for name in counts}
    assert result.ratio_n.item() == pytest.approx(ratio)


def test_without_a_dual_clip_nothing_bounds_a_bad_token() -> None:
    advantages, old = torch.tensor([-1.0]), torch.tensor([-6.0])
    result = clipped(torch.tensor([-1.0]), old, advantages, clip_low=0.2, clip_high=0.2)
    assert result.objective_n.item() == pytest.approx(-math.exp(5.0))
    assert not result.dual_n.item()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_that_became_a_thousand_times_likelier_breaks_nothing(advantage: float) -> None:
    """Claim: log ratios far outside of float32's range leave objective, gradient and the ratio finite."""
    logprobs = torch.zeros(1, requires_grad=True)
    result = clipped(
        logprobs, torch.tensor([-1000.0]), torch.tensor([advantage]), clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    result.objective_n.sum().backward()
    assert logprobs.grad is not None
    assert all(math.isfinite(value.item()) for value in (result.objective_n, logprobs.grad, result.ratio_n))
    assert result.ratio_n.item() == pytest.approx(math.exp(20.0))
