"""The policy's update in alignment, by hand: its loss and gradient, its figures, and what credit reaches which token.

Blind to several ranks and to the models; ``tests/integration/test_game.py`` plays with those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prism_megatron.advantages import GroupAdvantages
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.engine.runtime import World
from prism_megatron.game.credit import experience_of
from prism_megatron.training.policy_update import measure_policy, policy_batches, update_policy
from tests.unit.game.tiny_game import Bigram, form, world_of_one
from tests.unit.stages.align_given import (
    ADVANTAGES,
    GROUPS,
    NUM_TOKENS,
    TEMPERATURE,
    credits_of,
    given,
    learning,
    responses,
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.mark.parametrize("budget", [10, 1000])
def test_the_policy_gradient_is_that_of_every_response_token(world: World, budget: int) -> None:
    """Claim: the gradient is that of a loop over all answers, invalid ones too, at the sampling temperature.

    Each answer has its own advantage though answers are packed by their length; a mean over all tokens of the step.
    """
    policy: Any = Bigram()
    table = policy.weight.detach().clone().requires_grad_(True)
    logprobs = torch.log_softmax(table / TEMPERATURE, dim=-1)
    terms = [ADVANTAGES[g][r] * logprobs[before, token] for g, r, _, token, before in responses()]
    (-torch.stack(terms).sum() / NUM_TOKENS).backward()
    mean_advantage = sum(ADVANTAGES[g][r] for g, r, *_ in responses()) / NUM_TOKENS
    update = update_policy(policy, given(), learning(budget=budget), world=world)
    assert (len(policy.passes[0]) > 1) == (budget == 10)
    assert update.updated
    assert update.sums["policy_loss"] == pytest.approx(-mean_advantage, abs=1e-6), "ratios are 1"
    torch.testing.assert_close(policy.weight.grad, table.grad, rtol=0, atol=1e-6)


def test_figures_beside_the_loss_are_those_of_their_tokens(world: World) -> None:
    """Entropy and importance weights of all response tokens; the gap of those drawn by version 4, by kind of prompt."""
    policy: Any = Bigram()
    distribution = torch.log_softmax(policy.weight.detach().double() / TEMPERATURE, dim=-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    found = update_policy(policy, given(), learning(), world=world).sums
    gaps: dict[str, list[float]] = {"image": [], "text": []}
    weights, entropies, clamped = [], [], 0
    for g, r, place, token, before in responses():
        answer = GROUPS[g].rollouts[r]
        gap = float(distribution[before, token]) - answer.logprobs[place]
        weights.append(math.exp(min(max(gap, -20.0), 20.0)))
        clamped += abs(gap) > 20.0
        entropies.append(float(entropy[before]))
        if answer.token_versions()[place] == 4:
            gaps["image" if g == 0 else "text"].append(gap)
    assert found["entropy"] == pytest.approx(sum(entropies) / NUM_TOKENS, rel=1e-5)
    assert found["importance/tokens"] == NUM_TOKENS
    assert found["importance/sum"] == pytest.approx(sum(weights), rel=1e-5)
    assert found["importance/max"] == pytest.approx(max(weights), rel=1e-5)
    assert found["importance/clamped"] == clamped > 0
    assert found["importance/truncated"] == sum(weight > 2.0 for weight in weights) > 0
    for kind, num_tokens in (("image", 8), ("text", 3)):
        assert found[f"gap/{kind}/tokens"] == num_tokens == len(gaps[kind])
        assert found[f"gap/{kind}/sum"] == pytest.approx(sum(map(abs, gaps[kind])), rel=1e-5)
        assert found[f"gap/{kind}/max"] == pytest.approx(max(map(abs, gaps[kind])), rel=1e-5)


def test_without_an_update_nothing_is_left_behind(world: World) -> None:
    policy: Any = Bigram()
    update = measure_policy(policy, given(), learning(), world=world)
    assert update.result is None
    assert not update.updated
    assert policy.calls == ["policy looks"]
    assert policy.weight.grad is None
    assert update.sums["importance/tokens"] == NUM_TOKENS


def test_credit_by_segment_reaches_the_tokens(world: World) -> None:
    """The batch's advantages, row by row, are each rollout's own: perception's up to the caption's end."""
    perception, reasoning = ([torch.tensor(own) * scale for own in ADVANTAGES] for scale in (1, 100))
    advantages = [GroupAdvantages(p + 7, p, r, 2, 0, 0) for p, r in zip(perception, reasoning, strict=True)]
    experience = experience_of(GROUPS, credits_of(advantages), GameConfig(credit="segment"), version=4)
    (batch,) = policy_batches(experience, learning(budget=1000), world=world)
    label, found = batch.extras["label_mask"].bool(), batch.extras["advantages"]
    by_token: dict[int, float] = {}
    for g, r, place, token, _ in responses():
        span = GROUPS[g].rollouts[r].segments.perception
        own = ADVANTAGES[g][r]
        by_token[token] = own + 7 if span is None else own if place < span.end else 100 * own
    for token, value in zip(batch.input_ids_B_S[label].tolist(), found[label].tolist(), strict=True):
        if token != 2:  # the end token stands in several answers
            assert value == pytest.approx(by_token[token])


def test_a_micro_batch_stays_within_its_budget_with_padding(world: World) -> None:
    """Answers of 8, 7, 6 and 6 tokens in slots of 10: all would fit into 27 by their tokens, two do."""
    batches = policy_batches(given(), learning(budget=27, own=form(5)), world=world)
    assert [batch.input_ids_B_S.numel() for batch in batches] == [20, 20]
