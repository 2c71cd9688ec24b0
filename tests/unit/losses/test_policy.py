"""The policy loss against a slow float64 twin, and its on-policy and splitting properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_megatron.losses.policy import policy_gradient_loss

ROWS, TOKENS = 6, 5


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, TOKENS)
    logprobs = -3.0 * torch.rand(shape, generator=generator, dtype=torch.float64)
    old = logprobs + 0.8 * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[0, 0] = True
    return logprobs, old, advantages, mask


def slow_token_objective(logprob: float, old: float, advantage: float) -> float:
    ratio = math.exp(logprob - old)
    value = min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
    return max(value, 3.0 * advantage) if advantage < 0 else value


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_equals_a_loop_over_tokens(seed: int) -> None:
    """Loss equals the written-out dual-clip PPO objective of every masked token, to 1e-12."""
    logprobs, old, advantages, mask = random_case(seed)
    result = policy_gradient_loss(logprobs, advantages, mask, token_count=17.0, old_logprobs_B_S=old)
    expected = -sum(
        slow_token_objective(float(logprobs[b, t]), float(old[b, t]), float(advantages[b, t]))
        for b in range(ROWS)
        for t in range(TOKENS)
        if mask[b, t]
    )
    assert result.loss.item() == pytest.approx(expected / 17.0, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "binds"),
    [
        (0.5, 2.0, 1.0, False),
        (1.3, 2.0, 2.6, False),
        (1.5, 2.0, 2.8, True),
        (3.0, 2.0, 2.8, True),
        (0.85, -2.0, -1.8, True),
        (0.95, -2.0, -1.9, False),
        (1.5, -2.0, -3.0, False),
        (3.0, -2.0, -5.0, True),
    ],
)
def test_every_bound_has_its_side_and_is_counted_where_it_binds(
    ratio: float, advantage: float, objective: float, binds: bool
) -> None:
    """Bounds 0.9 and 1.4, and 2.5 times a negative advantage. Where one binds there is no gradient, but a count."""
    logprobs = torch.tensor([[-1.0 + math.log(ratio), 0.0]], dtype=torch.float64, requires_grad=True)
    result = policy_gradient_loss(
        logprobs,
        torch.full((1, 2), advantage, dtype=torch.float64),
        torch.tensor([[True, False]]),
        token_count=4.0,
        old_logprobs_B_S=torch.full((1, 2), -1.0, dtype=torch.float64),
        clip_low=0.1,
        clip_high=0.4,
        dual_clip=2.5,
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-objective / 4)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist()[0] == pytest.approx([0.0 if binds else -ratio * advantage / 4, 0.0])
    assert result.clipped_tokens.item() == int(binds)
    assert result.ratio_sum.item() == pytest.approx(ratio)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_that_became_a_thousand_times_likelier_breaks_nothing(advantage: float) -> None:
    """Claim: log ratios far outside of float32's range leave loss, gradient and the mean ratio finite."""
    logprobs = torch.zeros(1, 1, requires_grad=True)
    result = policy_gradient_loss(
        logprobs,
        torch.full((1, 1), advantage),
        torch.ones(1, 1),
        token_count=1.0,
        old_logprobs_B_S=torch.full((1, 1), -1000.0),
    )
    result.loss.backward()
    assert logprobs.grad is not None
    assert all(math.isfinite(value.item()) for value in (result.loss, logprobs.grad, result.ratio_sum))
    assert result.ratio_sum.item() == pytest.approx(math.exp(20.0))


def test_on_policy_gradient_is_reinforce_and_nothing_is_clipped() -> None:
    """Without old log-probs the gradient is -A/N on masked tokens and 0 elsewhere, exactly."""
    logprobs, _, advantages, mask = random_case(3)
    logprobs.requires_grad_(True)
    result = policy_gradient_loss(logprobs, advantages, mask, token_count=11.0)
    result.loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages * mask / 11.0, rtol=0, atol=1e-15)
    assert float(result.clipped_tokens) == 0
    assert float(result.ratio_sum) == int(mask.sum())


def test_equal_old_logprobs_give_the_on_policy_gradient() -> None:
    """A separate forward that gives the same old log-probs changes no gradient (issue: skipping it is exact)."""
    logprobs, _, advantages, mask = random_case(4)
    one, two = logprobs.clone().requires_grad_(True), logprobs.clone().requires_grad_(True)
    policy_gradient_loss(one, advantages, mask, token_count=9.0).loss.backward()
    policy_gradient_loss(two, advantages, mask, token_count=9.0, old_logprobs_B_S=logprobs).loss.backward()
    assert one.grad is not None
    assert two.grad is not None
    assert torch.equal(one.grad, two.grad)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, ROWS - 1))
def test_splitting_rows_changes_nothing(seed: int, cut: int) -> None:
    """Shares of any split add up to the loss of the whole, to 1e-12."""
    logprobs, old, advantages, mask = random_case(seed)
    count = float(mask.sum())

    def share(rows: slice) -> float:
        return float(
            policy_gradient_loss(
                logprobs[rows], advantages[rows], mask[rows], token_count=count, old_logprobs_B_S=old[rows]
            ).loss
        )

    assert share(slice(0, cut)) + share(slice(cut, None)) == pytest.approx(share(slice(None)), abs=1e-12)


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -1.0])
def test_padding_may_hold_anything(logprob: float) -> None:
    """What is not finite outside the mask, advantages too, reaches neither the loss nor the gradient."""
    logprobs, old, advantages, mask = random_case(5)
    expected = policy_gradient_loss(logprobs, advantages, mask, token_count=9.0, old_logprobs_B_S=old).loss
    dirty = logprobs.masked_fill(~mask, logprob).requires_grad_(True)
    loss = policy_gradient_loss(
        dirty,
        advantages.masked_fill(~mask, math.nan),
        mask,
        token_count=9.0,
        old_logprobs_B_S=old.masked_fill(~mask, -math.inf),
    ).loss
    loss.backward()
    assert loss.item() == expected.item()
    assert dirty.grad is not None
    assert bool(torch.isfinite(dirty.grad).all())
    assert not bool(dirty.grad[~mask].any())


def test_no_token_anywhere_is_zero_with_a_graph() -> None:
    """A rank without a response token still runs backward, with a zero gradient."""
    logprobs, _, advantages, mask = random_case(6)
    logprobs.requires_grad_(True)
    loss = policy_gradient_loss(logprobs, advantages, torch.zeros_like(mask), token_count=0.0).loss
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None
    assert not bool(logprobs.grad.any())
