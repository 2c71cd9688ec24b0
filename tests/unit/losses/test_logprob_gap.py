"""The gap between rollout and trainer log-probs, against a known pair of distributions and in hand-made rows."""

from __future__ import annotations

import math

import pytest
import torch

from prism_megatron.losses.logprob_gap import logprob_gap

NUM_DRAWS = 200_000


def test_figures_are_those_of_the_masked_tokens() -> None:
    policy = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -9.0, -9.0]])
    rollout = torch.tensor([[-1.5, -1.0, 0.0], [-0.5, 0.0, 0.0]])
    gap = logprob_gap(policy, rollout, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert (float(gap.tokens), float(gap.absolute), float(gap.largest)) == (3.0, 1.5, 1.0)
    assert float(gap.kl) == pytest.approx(math.exp(0.5) - 1.5 + math.exp(-1.0), rel=1e-12)


def test_k3_estimates_the_divergence_of_what_was_drawn() -> None:
    """Mean over draws of the rollout's distribution = KL(rollout ‖ policy), within five standard errors.

    The two directions differ by more than that, so a swapped ratio fails.
    """
    drawn_from = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    trained = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    tokens = torch.multinomial(drawn_from, NUM_DRAWS, replacement=True, generator=torch.Generator().manual_seed(0))
    policy, rollout = trained.log()[tokens][None], drawn_from.log()[tokens][None]
    terms = torch.expm1(policy - rollout) - (policy - rollout)
    error = float(terms.std()) / NUM_DRAWS**0.5
    exact = float((drawn_from * (drawn_from / trained).log()).sum())
    reverse = float((trained * (trained / drawn_from).log()).sum())
    found = float(logprob_gap(policy, rollout, torch.ones_like(policy)).kl) / NUM_DRAWS
    assert abs(exact - reverse) > 10 * error, "blind: the directions must differ"
    assert found == pytest.approx(exact, abs=5 * error)


def test_no_tokens_have_no_gap() -> None:
    empty = logprob_gap(torch.full((1, 2), -3.0), torch.zeros(1, 2), torch.zeros(1, 2))
    assert float(empty.tokens) == float(empty.absolute) == float(empty.largest) == float(empty.kl) == 0.0


def test_one_token_does_not_make_the_divergence_infinite() -> None:
    """Claim: k3 takes log-ratios beyond ±20 for that; the gap itself is told as it is."""
    found = logprob_gap(torch.tensor([[0.0, -1.0]]), torch.tensor([[-800.0, -1.0]]), torch.ones(1, 2))
    assert float(found.kl) == pytest.approx(math.expm1(20.0) - 20.0, rel=1e-12)
    assert (float(found.absolute), float(found.largest)) == (800.0, 800.0)
