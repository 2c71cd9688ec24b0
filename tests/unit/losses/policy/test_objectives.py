"""Every objective against its twin on ragged batches, whole and in micro-batches; what makes them the same, and not."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from prism_megatron.config.stages.algorithms import ALGORITHMS
from prism_megatron.config.stages.objective import Family, PolicyObjective
from prism_megatron.losses.policy.aggregate import denominator_of
from prism_megatron.losses.policy.rows import Rows
from prism_megatron.training.policy_loss import Tokens, tokens_loss
from tests.unit.losses.policy.twins import Found, Row, share_of, twin

NUM_BATCHES = 200
FAMILIES: tuple[Family, ...] = get_args(Family)
OBJECTIVES: dict[str, PolicyObjective] = {
    "policy-gradient": PolicyObjective(),
    **{name: preset.objective for name, preset in ALGORITHMS.items() if name != "prism-gspo"},  # the same as gspo
    # Bounds that both sides of a sequence's ratio meet often, and every other mean and estimator.
    "gspo, wide": PolicyObjective(family="gspo", clip_low=0.1, clip_high=0.15, aggregation="sequence-sum"),
    "gspo-token, wide": PolicyObjective(family="gspo-token", clip_low=0.1, clip_high=0.15),
    "gmpo, narrow": PolicyObjective(family="gmpo", clip_low=0.1, clip_high=0.2, kl="k1", kl_coefficient=0.3),
    "cispo, both": PolicyObjective(family="cispo", clip_low=0.3, clip_high=0.2, kl="k2", kl_coefficient=0.3),
    "dppo, narrow": PolicyObjective(family="dppo", divergence_bound=0.05, ratio_cap=1.3),
    "sapo, steep": PolicyObjective(family="sapo", soft_positive=3.0, soft_negative=7.0, aggregation="budget",
                                   token_budget=9),
}  # fmt: skip
BOUNDED = set(OBJECTIVES) - {"policy-gradient", "sapo", "sapo, steep"}


@functools.cache
def ragged(seed: int, *, weighted: bool) -> tuple[Row, ...]:
    """Three to seven answers of one to nine tokens; of weighted ones some tokens, and some whole answers, are out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int, scale: float) -> list[float]:
        return (scale * torch.randn(n, generator=generator, dtype=torch.float64)).tolist()

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    rows = []
    for number in range(3 + below(5)):
        n = 1 + below(9)
        old = [-0.05 - abs(value) for value in normal(n, 1.5)]
        logprobs = [min(value + step, -0.01) for value, step in zip(old, normal(n, 0.6), strict=True)]
        whole = normal(1, 1.0) * n
        advantages = whole if number % 2 else normal(n, 1.0)  # of the answer, or token by token
        weights = [1.0] * n
        if weighted:
            weights = [0.0 if below(4) == 0 or number == 1 else 0.2 + abs(value) for value in normal(n, 1.0)]
        rows.append(Row(logprobs, old, advantages, weights, [value - 0.3 for value in normal(n, 0.5)]))
    return tuple(rows)


def flat(rows: Sequence[Row], name: str) -> Tensor:
    return torch.tensor([value for row in rows for value in getattr(row, name)], dtype=torch.float64)


def found_by_ours(objective: PolicyObjective, rows: Sequence[Row], parts: Sequence[Sequence[int]]) -> Found:
    """The sum over micro-batches, each of some rows; denominators are those of all."""
    answers = sum(bool(row.kept) for row in rows)
    denominator = denominator_of(
        objective.aggregation,
        tokens=sum(len(row.kept) for row in rows),
        rows=answers,
        budget=objective.token_budget,
    )
    found = Found(gradient=[[] for _ in rows])
    for numbers in parts:
        part = [rows[i] for i in numbers]
        logprobs = flat(part, "logprobs").requires_grad_()
        weights = flat(part, "weights")
        in_order = Rows(
            torch.tensor([i for i, row in enumerate(part) for _ in row.logprobs], dtype=torch.int64),
            weights > 0,
            torch.tensor([float(len(row.kept)) for row in part]),
        )
        is_weighted = bool((weights != 1).any())
        tokens = Tokens(
            flat(part, "advantages"),
            in_order,
            flat(part, "old"),
            flat(part, "reference"),
            weights if is_weighted else None,
        )
        share = tokens_loss(objective, logprobs, torch.zeros_like(logprobs), tokens, denominator=denominator)
        share.loss.backward()
        assert logprobs.grad is not None
        found.loss += share.loss.item()
        pieces = logprobs.grad.split([len(row.logprobs) for row in part])
        for number, piece in zip(numbers, pieces, strict=True):
            found.gradient[number] = piece.tolist()
        for key, value in share.sums.items():
            name = {"clip/low": "low", "clip/high": "high", "clip/dual": "dual", "ratio/sum": "ratio_sum",
                    "kl/reference": "kl_sum"}.get(key)  # fmt: skip
            if name is not None:
                setattr(found, name, getattr(found, name) + float(value))
        found.ratio_max = max(found.ratio_max, float(share.maxima.get("ratio/max", 0.0)))
    return found


def assert_same(ours: Found, expected: Found, objective: PolicyObjective) -> None:
    assert ours.loss == pytest.approx(expected.loss, abs=1e-12, rel=1e-12)
    for mine, wanted in zip(ours.gradient, expected.gradient, strict=True):
        assert len(mine) == len(wanted)
        assert all(abs(a - b) <= 1e-12 * max(1.0, abs(b)) for a, b in zip(mine, wanted, strict=True))
    if objective.ratio != "none":
        assert (ours.low, ours.high, ours.dual) == (expected.low, expected.high, expected.dual)
        assert ours.ratio_sum == pytest.approx(expected.ratio_sum, rel=1e-12)
        assert ours.ratio_max == pytest.approx(expected.ratio_max, rel=1e-12)
    if objective.kl != "none":
        assert ours.kl_sum == pytest.approx(expected.kl_sum, rel=1e-11)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_equals_its_twin(name: str) -> None:
    """Claim: value, gradient, counts of bounds, ratios and divergence are the twin's, to 1e-12 in float64.

    200 ragged batches, 80 of them in two micro-batches too, every other one weighted with tokens and answers left out.
    In all of them together every bound that a family has holds some token.
    """
    objective = OBJECTIVES[name]
    low = high = dual = 0
    for seed in range(NUM_BATCHES):
        rows = ragged(seed, weighted=bool(seed % 2))
        expected = twin(objective, rows)
        cut = 1 + seed % (len(rows) - 1)
        assert_same(found_by_ours(objective, rows, [range(len(rows))]), expected, objective)
        if seed < 80:
            assert_same(found_by_ours(objective, rows, [range(cut, len(rows)), range(cut)]), expected, objective)
        low, high, dual = low + expected.low, high + expected.high, dual + expected.dual
    print(f"{name:18} tokens held: low {low}, high {high}, dual {dual}")
    if name in BOUNDED:
        assert high > 0
        assert (low > 0) == (objective.family != "cispo" or objective.clip_low < 1)
        assert (dual > 0) == (objective.family == "clipped" and 0 < objective.dual_clip < 5)


def test_the_twins_derivatives_are_those_of_their_values() -> None:
    """The oracle's own check: central differences of what moves with log-probs, away from the bounds' corners.

    Blind to families with a detached factor, whose gradient is by definition not the value's.
    """
    step = 1e-6
    for name in ("clipped", "gspo", "gmpo", "sapo"):
        family: Family = name
        objective = PolicyObjective(family=family, clip_low=0.31, clip_high=0.33, kl="k3", kl_coefficient=0.5)
        for seed in range(20):
            rows = ragged(seed, weighted=True)
            gradient = twin(objective, rows).gradient
            for i, row in enumerate(rows):
                for t in range(len(row.logprobs)):
                    ends = []
                    for sign in (1, -1):
                        moved = [*row.logprobs]
                        moved[t] += sign * step
                        others = [replace(row, logprobs=moved) if j == i else other for j, other in enumerate(rows)]
                        ends.append(twin(objective, others).loss)
                    assert gradient[i][t] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7), name


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sequence-sum", "budget"])
def test_at_the_policy_that_drew_all_are_reinforce(family: Family, aggregation: str) -> None:
    """Claim: where nothing has moved, and one update is all there is, the gradient is -A times the token's share.

    For gspo and gmpo it is the answer's mean advantage, which is the same for advantages of whole answers. With old
    log-probs that are equal, and without any.
    """
    objective = PolicyObjective(
        family=family,
        aggregation=aggregation,  # type: ignore[arg-type]
        token_budget=50 if aggregation == "budget" else 0,
    )
    for seed in range(20):
        rows = [
            replace(row, old=row.logprobs, advantages=[row.advantages[0]] * len(row.logprobs))
            for row in ragged(seed, weighted=False)
        ]
        ours = found_by_ours(objective, rows, [range(len(rows))])
        for row, gradient in zip(rows, ours.gradient, strict=True):
            share = share_of(objective, rows, row)
            assert gradient == pytest.approx([-share * a for a in row.advantages], abs=1e-14)
        assert ours.low == ours.high == ours.dual == 0
        assert ours.ratio_sum == pytest.approx(sum(len(row.logprobs) for row in rows))


@pytest.mark.parametrize(
    "family", ["policy-gradient", "clipped", "gspo", "gspo-token", "gmpo", "sapo", "cispo", "dppo"]
)
def test_no_old_logprobs_are_those_of_now(family: Family) -> None:
    """The gradient without old log-probs is, to the last bit, that with old ones that are the new ones."""
    generator = torch.Generator().manual_seed(5)
    logprobs = -torch.rand(9, generator=generator)
    rows = Rows(torch.tensor([0] * 4 + [1] * 5), torch.ones(9, dtype=torch.bool), torch.tensor([4.0, 5.0]))
    advantages = torch.randn(9, generator=generator)
    gradients = []
    for old in (None, logprobs.clone()):
        leaf = logprobs.clone().requires_grad_()
        tokens = Tokens(advantages, rows, old)
        tokens_loss(PolicyObjective(family=family), leaf, leaf.detach(), tokens, denominator=9.0).loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert bool(gradients[0].any())


def test_gspo_by_hand() -> None:
    """Two tokens of log-ratios 0.1 and 0.3: s = exp(0.2). Within a bound of 0.3 both get s A / 2; beyond it nothing.

    A second answer moved down by as much is held for A < 0 only.
    """
    s = math.exp(0.2)
    up = Row([-1.0, -1.0], [-1.1, -1.3], [2.0, 2.0], [1.0, 1.0], [0.0, 0.0])
    down = Row([-1.0, -1.0], [-0.9, -0.7], [-2.0, -2.0], [1.0, 1.0], [0.0, 0.0])
    wide = PolicyObjective(family="gspo", clip_low=0.3, clip_high=0.3, aggregation="sequence-mean")
    found = found_by_ours(wide, [up, down], [range(2)])
    assert found.loss == pytest.approx(-(s * 2 - 2 / s) / 2)
    assert found.gradient[0] == pytest.approx([-s * 2 / 2 / 2] * 2)
    assert found.gradient[1] == pytest.approx([2 / s / 2 / 2] * 2)
    narrow = replace(wide, clip_low=0.1, clip_high=0.15)
    found = found_by_ours(narrow, [up, down], [range(2)])
    assert found.loss == pytest.approx(-(1.15 * 2 - 0.9 * 2) / 2)
    assert found.gradient == [[0.0, 0.0], [0.0, 0.0]]
    assert (found.low, found.high) == (2, 2)


def test_an_entropy_bonus_is_a_mean_like_the_objective() -> None:
    """Its gradient at each token is minus the coefficient times the token's share; a token left out has none."""
    entropy = torch.tensor([0.5, 0.25, 2.0, 1.0], requires_grad=True)
    kept = torch.tensor([True, True, False, True])
    rows = Rows(torch.tensor([0, 0, 0, 1]), kept, torch.tensor([2.0, 1.0]))
    tokens = Tokens(torch.zeros(4), rows)
    objective = PolicyObjective(entropy_coefficient=0.5, aggregation="sequence-mean")
    share = tokens_loss(objective, torch.zeros(4), entropy, tokens, denominator=2.0)
    share.loss.backward()
    assert share.loss.item() == pytest.approx(-0.5 * ((0.5 + 0.25) / 2 + 1.0) / 2)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.125, -0.125, 0.0, -0.25])


def test_a_divergence_needs_a_reference() -> None:
    rows = Rows(torch.tensor([0]), torch.tensor([True]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="needs log-probs of a reference"):
        tokens_loss(
            PolicyObjective(kl="k3", kl_coefficient=0.1), torch.zeros(1), torch.zeros(1),
            Tokens(torch.zeros(1), rows), denominator=1.0,
        )  # fmt: skip


def test_no_token_is_zero_with_a_graph() -> None:
    """A rank without a token runs the same backward, for every family, and has names for every figure."""
    for name, objective in OBJECTIVES.items():
        logprobs = torch.zeros(0, requires_grad=True)
        nothing = torch.zeros(0)
        rows = Rows(nothing.long(), nothing.bool(), torch.tensor([3.0]))
        share = tokens_loss(objective, logprobs, nothing, Tokens(nothing, rows, nothing, nothing), denominator=7.0)
        share.loss.backward()
        assert share.loss.item() == 0.0, name
        assert logprobs.grad is not None
        assert objective.ratio == "none" or share.maxima["ratio/max"].item() == 0.0
