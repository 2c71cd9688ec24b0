"""Importance weights of off-policy tokens, against hand-made rows and a known pair of distributions."""

from __future__ import annotations

import math

import pytest
import torch

from prism_megatron.losses.importance import TRUNCATE_AT, importance_weights

NUM_DRAWS = 200_000


def test_figures_are_those_of_the_masked_tokens() -> None:
    """Oracle in float64, by hand. A weight that is exactly the bound is not above it."""
    rollout = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]])
    policy = torch.tensor([[-1.5, -1.375, -9.0], [-0.5, -9.0, -9.0]])
    ratios = [math.exp(-0.5), math.exp(0.625), 1.0]
    weights = importance_weights(policy, rollout, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), truncate_at=1.0)
    assert float(weights.tokens) == 3.0
    assert float(weights.total) == pytest.approx(math.fsum(ratios), rel=1e-12)
    assert float(weights.squares) == pytest.approx(math.fsum(r * r for r in ratios), rel=1e-12)
    assert float(weights.largest) == pytest.approx(math.exp(0.625), rel=1e-12)
    assert float(weights.truncated) == 1.0
    assert float(weights.clamped) == 0.0


def test_weights_of_what_another_policy_drew_have_mean_one() -> None:
    """And the mean of their squares is sum p²/q; within five standard errors, which a swapped ratio exceeds by far."""
    drawn_from = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    trained = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    tokens = torch.multinomial(drawn_from, NUM_DRAWS, replacement=True, generator=torch.Generator().manual_seed(0))
    policy, rollout = trained.log()[tokens][None], drawn_from.log()[tokens][None]
    found = importance_weights(policy, rollout, torch.ones_like(policy))
    each = (trained / drawn_from)[tokens]
    error, error_of_squares = (float(values.std()) / NUM_DRAWS**0.5 for values in (each, each.square()))
    second_moment = float((trained.square() / drawn_from).sum())
    assert float(found.total) / NUM_DRAWS == pytest.approx(1.0, abs=5 * error)
    assert float(found.squares) / NUM_DRAWS == pytest.approx(second_moment, abs=5 * error_of_squares)
    assert float(found.truncated) == int((each > TRUNCATE_AT).sum()) > 0
    swapped = importance_weights(rollout, policy, torch.ones_like(policy))
    assert abs(float(swapped.total) / NUM_DRAWS - 1.0) > 10 * error, "blind: the directions must differ"


def test_one_token_does_not_make_the_mean_infinite() -> None:
    """Claim: a log-ratio of 800, whose exponential no float64 holds, counts as 20, and -800 as -20; both are counted.

    20 itself is not clamped, and what is masked is neither clamped nor counted.
    """
    rollout = torch.tensor([[-800.0, 0.0, -20.0, -21.0, -1000.0]])
    policy = torch.tensor([[0.0, -800.0, 0.0, 0.0, 0.0]])
    found = importance_weights(policy, rollout, torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]]))
    assert float(found.clamped) == 3.0
    assert float(found.total) == pytest.approx(3 * math.exp(20.0) + math.exp(-20.0), rel=1e-12)
    assert float(found.squares) == pytest.approx(3 * math.exp(40.0), rel=1e-12)
    assert float(found.largest) == pytest.approx(math.exp(20.0), rel=1e-12)


def test_no_tokens_have_no_weights() -> None:
    empty = importance_weights(torch.full((1, 2), -3.0), torch.zeros(1, 2), torch.zeros(1, 2))
    assert not any(
        map(float, (empty.tokens, empty.total, empty.squares, empty.truncated, empty.largest, empty.clamped))
    )
