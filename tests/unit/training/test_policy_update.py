"""Several updates from one batch, corrections and references, with a policy of one tensor; by hand, in loops.

Blind to several ranks; ``tests/distributed/test_policy_objectives.py`` has those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from prism_megatron.config.stages.objective import CorrectionConfig, Family, PolicyObjective
from prism_megatron.engine.batch import Extra
from prism_megatron.engine.runtime import World
from prism_megatron.training import policy_update
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.training.policy_update import (
    UpdatePlan,
    beside_reference,
    measure_policy,
    plan_microbatches,
    planned_batches,
    scores_of,
    update_figures,
    update_policy,
)
from prism_megatron.types import Prompt, Rollout, Segments, VersionSpan
from tests.unit.game.tiny_game import Bigram, form, sequences_of, world_of_one
from tests.unit.losses.policy.twins import Row, twin

ANSWERS = [(8, 9, 2), (10, 11, 12, 2), (13, 2), (14, 15, 16, 17, 2)]
ADVANTAGES = [1.5, -1.0, 0.5, -2.0]
PROMPT = (5, 6, 7)
NUM_TOKENS = sum(map(len, ANSWERS))
TRUNCATED = CorrectionConfig("token-truncate", correction_high=1.5)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def plan(objective: PolicyObjective, *, budget: int = 12, temperature: float = 1.0) -> UpdatePlan:
    return UpdatePlan(objective, form(), budget, temperature)


def logprobs_under(weight: Tensor, answer: Sequence[int], temperature: float = 1.0) -> list[float]:
    table = torch.log_softmax(weight.detach().double() / temperature, dim=-1)
    return [float(table[a, b]) for a, b in zip((PROMPT[-1], *answer), answer, strict=False)]


def experience(rollout_logprobs: Sequence[Sequence[float]]) -> Experience:
    rows = []
    for answer, drawn, advantage in zip(ANSWERS, rollout_logprobs, ADVANTAGES, strict=True):
        versions = (VersionSpan(1, 0, len(answer)),)
        rollout = Rollout(answer, tuple(drawn), "stop", versions, Segments(None, None, "not asked for"))
        rows.append(ExperienceRow(Prompt("p", PROMPT, (), "?"), rollout, [advantage] * len(answer)))
    return Experience(rows, version=1)


def drawn_by(weight: Tensor, offsets: Sequence[float] = (0.0,) * 4) -> Experience:
    return experience([[lp + o for lp in logprobs_under(weight, a)] for a, o in zip(ANSWERS, offsets, strict=True)])


def table_gradient(weight: Tensor, coefficients: Sequence[Sequence[float]]) -> Tensor:
    """Of ``sum c_t log pi(token t)``."""
    leaf = weight.detach().clone().requires_grad_()
    table = torch.log_softmax(leaf, dim=-1)
    terms = [
        c * table[a, b]
        for answer, own in zip(ANSWERS, coefficients, strict=True)
        for c, a, b in zip(own, (PROMPT[-1], *answer), answer, strict=False)
    ]
    torch.stack(terms).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_every_token_is_scored_at_its_own_place(world: World) -> None:
    """Claim: log-probs and entropies are those of the table, under the temperature, whatever the micro-batches."""
    policy: Any = Bigram()
    for budget in (7, 100):
        given = drawn_by(policy.weight)
        found = scores_of(policy, given, plan(PolicyObjective(), budget=budget, temperature=0.5), world=world)
        distribution = torch.log_softmax(policy.weight.detach().double() / 0.5, dim=-1)
        entropy = -(distribution.exp() * distribution).sum(-1)
        for answer, own in zip(ANSWERS, found, strict=True):
            assert own.logprobs == pytest.approx(logprobs_under(policy.weight, answer, 0.5), abs=1e-5)
            assert own.entropies == pytest.approx([float(entropy[a]) for a in (PROMPT[-1], *answer[:-1])], abs=1e-5)
    assert policy.weight.grad is None


def test_a_second_mini_batch_is_held_against_the_policy_before_the_first(world: World) -> None:
    """Claim: two updates with the log-probs of before both; the second one's gradient and counts are the twin's."""
    policy: Any = Bigram()
    start = policy.weight.detach().clone()
    objective = PolicyObjective(family="clipped", clip_low=0.1, clip_high=0.1, mini_batches=2)
    update = update_policy(policy, drawn_by(start), plan(objective), world=world)
    assert policy.calls == ["policy is asked", *["policy learns", "policy steps"] * 2]
    assert [one.kept_tokens for one in update.updates] == [7, 7]
    # The first update, and with it the policy that the second one sees.
    first = [Row(lp := logprobs_under(start, a), lp, [adv] * len(a), [1.0] * len(a), lp)
             for a, adv in zip(ANSWERS[:2], ADVANTAGES, strict=False)]  # fmt: skip
    gradient = twin(objective, first).gradient
    middle = start * 0.5 - table_gradient(start, [*gradient, [0.0] * 2, [0.0] * 5])
    second = [Row(logprobs_under(middle, a), logprobs_under(start, a), [adv] * len(a), [1.0] * len(a), [])
              for a, adv in zip(ANSWERS[2:], ADVANTAGES[2:], strict=True)]  # fmt: skip
    expected = twin(objective, second)
    assert expected.low + expected.high > 0
    sums = update.updates[1].sums
    assert (sums["clip/low"], sums["clip/high"]) == (expected.low, expected.high)
    assert sums["policy_loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert sums["ratio/max"] == pytest.approx(expected.ratio_max, rel=1e-4)
    end = middle * 0.5 - table_gradient(middle, [[0.0] * 3, [0.0] * 4, *expected.gradient])
    torch.testing.assert_close(policy.weight.detach(), end, rtol=0, atol=1e-5)
    # The whole step's figures.
    assert update.updated
    assert update.sums["clip/high"] == sum(one.sums["clip/high"] for one in update.updates)
    assert update.sums["policy_loss"] == pytest.approx(sum(one.sums["policy_loss"] for one in update.updates) / 2)
    figures = update_figures(update)
    assert figures["policy_updates"] == 2
    assert figures["clip/low_share"] == pytest.approx(expected.low / NUM_TOKENS)
    assert figures["ratio/max"] == update.sums["ratio/max"]
    norms = [one.result.grad_norm for one in update.updates]
    assert figures["policy_grad_norm/max"] == max(norms)
    assert figures["policy_grad_norm/mean"] == pytest.approx(sum(norms) / 2)


def test_the_rollouts_mismatch_is_that_of_before_and_counted_once(world: World) -> None:
    """Claim: three epochs move the policy far; gap and importance weights are of the one that drew, once a token."""
    policy: Any = Bigram()
    objective = PolicyObjective(family="sapo", mini_batches=2, epochs=3)
    update = update_policy(policy, drawn_by(policy.weight), plan(objective), world=world)
    assert len(update.updates) == 6
    assert update.sums["importance/tokens"] == update.sums["gap/text/tokens"] == NUM_TOKENS
    assert update.sums["gap/text/max"] < 1e-5
    assert update.sums["ratio/max"] > 1.5


def test_a_correction_weighs_tokens_and_leaves_some_out_of_the_mean(world: World) -> None:
    """Claim: weights are old over rollout, held at 1.5; with a mask what is outside is in neither sum nor mean.

    Answers were drawn with log-probs that are 0.2, 1, -0.5 and 0 above the trainer's.
    """
    offsets = (0.2, 1.0, -0.5, 0.0)
    lengths = [len(answer) for answer in ANSWERS]
    for kind, weights in (
        ("token-truncate", [math.exp(-0.2), math.exp(-1.0), 1.5, 1.0]),
        ("token-mask", [math.exp(-0.2), 0.0, 0.0, 1.0]),
    ):
        policy: Any = Bigram()
        start = policy.weight.detach().clone()
        correction = replace(TRUNCATED, correction=kind)  # type: ignore[arg-type]  # both are kinds
        update = update_policy(
            policy, drawn_by(start, offsets), plan(PolicyObjective(correction=correction)), world=world
        )
        kept = sum(n for n, w in zip(lengths, weights, strict=True) if w)
        coefficients = [[-w * a / kept] * n for w, a, n in zip(weights, ADVANTAGES, lengths, strict=True)]
        torch.testing.assert_close(policy.weight.grad, table_gradient(start, coefficients), rtol=0, atol=1e-5)
        assert update.sums["correction/kept_tokens"] == kept
        assert update.sums["correction/rejected_tokens"] == NUM_TOKENS - kept
        assert update.sums["correction/truncated_tokens"] == (2 if kind == "token-truncate" else 0)
        flat = [w for w, n in zip(weights, lengths, strict=True) for _ in range(n) if w]
        share = sum(flat) ** 2 / (len(flat) * sum(w * w for w in flat))
        assert update.sums["correction/effective_share"] == pytest.approx(share, rel=1e-4)


def test_an_answer_that_is_vetoed_is_no_answer_of_the_mean(world: World) -> None:
    """A mean over answers of means over tokens: of four answers one is vetoed, so that three count."""
    policy: Any = Bigram()
    start = policy.weight.detach().clone()
    correction = CorrectionConfig("sequence-truncate", correction_high=9.0, correction_veto=0.5)
    objective = PolicyObjective(aggregation="sequence-mean", correction=correction)
    update = update_policy(policy, drawn_by(start, (0.0, 1.0, 0.0, 0.0)), plan(objective), world=world)
    coefficients = [[0.0 if n == 4 else -a / n / 3] * n for a, n in zip(ADVANTAGES, map(len, ANSWERS), strict=True)]
    torch.testing.assert_close(policy.weight.grad, table_gradient(start, coefficients), rtol=0, atol=1e-5)
    assert update.sums["correction/vetoed_rollouts"] == 1


def test_where_all_is_left_out_nothing_moves(world: World) -> None:
    """Claim: the policy is only looked at, though a step would decay its weights; every figure is a number or None."""
    policy: Any = Bigram()
    start = policy.weight.detach().clone()
    correction = CorrectionConfig("token-mask", correction_high=1.01)
    update = update_policy(
        policy, drawn_by(start, (9.0,) * 4), plan(PolicyObjective(correction=correction)), world=world
    )
    assert not update.updated
    assert update.result is None
    assert policy.calls == ["policy is asked", "policy looks"]
    assert torch.equal(policy.weight.detach(), start)
    assert update.sums["correction/kept_tokens"] == 0
    assert "correction/effective_share" not in update.sums
    assert update.sums["policy_loss"] == 0.0
    # One mini-batch of two.
    policy = Bigram()
    given = drawn_by(policy.weight, (0.0, 0.0, 9.0, 9.0))
    objective = PolicyObjective(family="clipped", mini_batches=2, correction=correction)
    update = update_policy(policy, given, plan(objective), world=world)
    assert [one.kept_tokens for one in update.updates] == [7]
    assert update.updated


def test_a_divergence_pulls_towards_the_reference(world: World) -> None:
    """Claim: with advantages of 0 the gradient is the estimator's alone; the figure is its mean."""
    policy: Any = Bigram()
    reference: Any = Bigram()
    with torch.no_grad():
        reference.weight.mul_(0.3)
    start = policy.weight.detach().clone()
    given = drawn_by(start)
    given = replace(given, rows=[replace(row, advantages=[0.0] * len(row.advantages)) for row in given.rows])
    objective = PolicyObjective(kl="k3", kl_coefficient=0.5)
    beside = beside_reference(reference, given, plan(objective), world=world)
    update = update_policy(policy, beside, plan(objective), world=world)
    rows = [Row(lp := logprobs_under(start, a), lp, [0.0] * len(a), [1.0] * len(a), logprobs_under(reference.weight, a))
            for a in ANSWERS]  # fmt: skip
    expected = twin(objective, rows)
    assert update.sums["policy_loss"] == pytest.approx(expected.loss, rel=1e-4)
    torch.testing.assert_close(policy.weight.grad, table_gradient(start, expected.gradient), rtol=0, atol=1e-5)
    assert update_figures(update)["kl/reference"] == pytest.approx(expected.kl_sum / NUM_TOKENS, rel=1e-4)
    with pytest.raises(ValueError, match="k3 needs log-probs of a reference"):
        update_policy(policy, given, plan(objective), world=world)


def test_one_update_asks_for_no_log_probs(world: World) -> None:
    """Without a correction the policy that trains is its own old one, and no pass is spent on it."""
    policy: Any = Bigram()
    objective = PolicyObjective(family="gspo")
    update_policy(policy, drawn_by(policy.weight), plan(objective), world=world)
    assert policy.calls == ["policy learns", "policy steps"]
    measured = measure_policy(policy, drawn_by(policy.weight), plan(objective), world=world)
    assert measured.sums["ratio/sum"] == pytest.approx(NUM_TOKENS)
    assert update_figures(measured)["policy_updates"] == 0
    assert update_figures(measured)["ratio/mean"] is None


def test_old_log_probs_that_rows_bring_are_taken(world: World) -> None:
    """Claim: no pass is spent on them, and ratios are to them, in one update as in two."""
    for objective in (PolicyObjective(family="clipped"), PolicyObjective(family="clipped", mini_batches=2)):
        policy: Any = Bigram()
        given = drawn_by(policy.weight)
        rows = [replace(row, old_logprobs=[lp - 0.5 for lp in row.rollout.logprobs]) for row in given.rows]
        update = update_policy(policy, replace(given, rows=rows), plan(objective), world=world)
        assert "policy is asked" not in policy.calls
        first = update.updates[0]
        assert first.sums["ratio/sum"] == pytest.approx(math.exp(0.5) * first.kept_tokens, rel=1e-5)


def test_a_dropped_gradient_is_the_step_s_result(world: World) -> None:
    policy: Any = Bigram()
    policy.norms = [1.0, math.inf, 2.0, 3.0]
    objective = PolicyObjective(family="clipped", mini_batches=4)
    update = update_policy(policy, drawn_by(policy.weight), plan(objective), world=world)
    assert update.updated
    assert update.result is not None and not update.result.updated
    assert [one.result.updated for one in update.updates] == [True, False, True, True]


def test_rows_are_divided_in_their_order() -> None:
    weight = Bigram().weight
    whole = drawn_by(weight)
    assert [[row.rollout.token_ids for row in part.rows] for part in whole.parts(2)] == [ANSWERS[:2], ANSWERS[2:]]
    assert [len(part.rows) for part in whole.parts(3)] == [1, 1, 2]
    assert whole.parts(1) == [whole]
    with pytest.raises(ValueError, match="4 rollouts cannot be 5 mini-batches"):
        whole.parts(5)


def of_one_prompt() -> Experience:
    """Answers to the same prompt object, as a group's are."""
    given = drawn_by(Bigram().weight)
    return replace(given, rows=[replace(row, prompt=given.rows[0].prompt) for row in given.rows])


def test_neighbours_share_their_prompt_and_keep_its_last_token(world: World) -> None:
    """Claim: what each sequence sees is its prompt and its answer, and figures stand at the same tokens."""
    given = of_one_prompt()
    own = plan(PolicyObjective(), budget=100)
    (shared,) = planned_batches(given, replace(own, form=replace(own.form, share_prompts=True)), world=world)
    (whole,) = planned_batches(given, own, world=world)
    assert shared.rows[0] is None and sorted(row for row in shared.rows if row is not None) == [0, 1, 2, 3]
    assert shared.batch.prefixes == (None, 0, 0, 0, 0) and whole.batch.prefixes == ()
    seen, wanted = (dict(zip(one.rows, sequences_of(one.batch), strict=True)) for one in (shared, whole))
    assert seen == {**wanted, None: PROMPT[:-1]}
    for name, values_B_S in whole.batch.extras.items():
        assert values_B_S.sum() == pytest.approx(shared.batch.extras[name].sum()), name
    tokens_of = [batch.input_ids_B_S[batch.extras[Extra.LABEL_MASK] > 0] for batch in (whole.batch, shared.batch)]
    assert torch.equal(*(tokens.sort().values for tokens in tokens_of))


def test_shared_prompts_fit_the_budget_and_fill_rounds() -> None:
    """Claim: a micro-batch is charged each prompt once, and there are as many of them as a round asks for."""
    rows, own = of_one_prompt().rows, form(1, share_prompts=True)
    for budget, rounds in ((100, 1), (len(PROMPT) + 6, 1), (1, 1), (100, 2), (100, 3), (100, 4), (100, 6)):
        planned = plan_microbatches(rows, own, budget=budget, rounds_of=rounds, ranks=rounds)
        assert sorted(number for numbers in planned for number in numbers) == [0, 1, 2, 3]
        assert len(planned) % rounds == 0 and sum(not numbers for numbers in planned) == max(0, rounds - 4)
        for numbers in filter(None, planned):
            cost = len(PROMPT) - 1 + sum(1 + len(ANSWERS[number]) for number in numbers)
            assert cost <= budget or len(numbers) == 1


@pytest.mark.parametrize("family", get_args(Family))
def test_a_micro_batch_that_fills_up_teaches_nothing(
    world: World, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: figures and weights after the update are those without it."""
    planned, found = policy_update.plan_microbatches, []
    for fillers in (0, 2):
        policy: Any = Bigram()

        def filled(*rest: Any, count: int = fillers, **named: Any) -> list[tuple[int, ...]]:
            return [*planned(*rest, **named), *[()] * count]

        monkeypatch.setattr(policy_update, "plan_microbatches", filled)
        given = drawn_by(policy.weight, (0.1, -0.1, 0.2, 0.0))
        update = update_policy(policy, given, plan(PolicyObjective(family=family), budget=100), world=world)
        assert len(policy.passes[-1]) == 1 + fillers
        found.append((update, policy.weight.detach().clone()))
    (alone, weight), (other, same) = found
    assert other.sums == pytest.approx(alone.sums)
    assert other.result == alone.result
    torch.testing.assert_close(same, weight)


def test_planned_rows_are_those_that_lie_in_a_batch(world: World) -> None:
    given = drawn_by(Bigram().weight)
    for one in planned_batches(given, plan(PolicyObjective(), budget=14), world=world):
        assert [len(PROMPT) + len(ANSWERS[row]) for row in one.rows if row is not None] == list(one.batch.lengths)
