"""The discriminator's half of a round, with a scorer of one weight: scores, loss, counts and updates by hand.

Blind to several ranks and to the model, which ``tests/parity/test_scoring.py`` and ``test_layouts.py`` are there for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.provider import StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.game import scoring_plan
from prism_megatron.game.judge import Judgement, JudgePlan, game_loss, train
from prism_megatron.game.judged_rows import ScorePart, discriminator_batch, segment_row
from prism_megatron.game.scoring_plan import TrunkCost
from prism_megatron.training.batches import BatchFormat
from prism_megatron.types import PERCEPTION, REASONING, PreferenceGroup
from tests.unit.game.tiny_game import Scorer, form, group, invalid, response, rollout, score_of, world_of_one

GROUPS = [
    group(response([8, 9], [10]), rollout([11], [12, 13]), invalid(14), rollout([15, 16, 17], [18]), prompt=(5, 6)),
    group(response([19, 20, 21]), rollout([22], [23]), prompt=(7, 4, 7)),
]
REPLAYED = [group(response([24], [25, 26]), rollout([27], [28]), rollout([29, 30], [31]), prompt=(3,))]
LEARNT = [*GROUPS, *REPLAYED]
GAME = GameConfig(score_regulariser=0.3)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


def judged(
    world: World,
    scorer: Scorer,
    groups: Sequence[PreferenceGroup] = GROUPS,
    game: GameConfig = GAME,
    *,
    own: BatchFormat | None = None,
    budget: int = 12,
    load_balance: float = 0.0,
    **rest: Any,
) -> Judgement:
    """A budget of 12 makes several micro-batches; references are apart, or where prompts are shared repeated."""
    player: Any = scorer
    plan = JudgePlan(
        own or form(),
        budget,
        score_regulariser=game.score_regulariser,
        seed=1,
        load_balance=load_balance,
        updates_per_step=game.discriminator_updates_per_step,
    )
    return train(player, groups, plan, world=world, **{"step": 0, **rest})


def expected_score(own: PreferenceGroup, tower: int, r: int | None) -> float:
    answer = own.reference if r is None else own.rollouts[r]
    return score_of(segment_row(own, answer, tower, form()).token_ids, tower)


def expected_pairs(tower: int) -> list[tuple[float, float]]:
    """Scores of reference and rollout, at weight 1."""
    return [
        (expected_score(own, tower, None), expected_score(own, tower, r))
        for own in LEARNT
        if tower in own.towers
        for r in own.valid_rollouts
    ]


@pytest.mark.parametrize("own", [form(), form(share_prompts=True), form(4)])
def test_scores_are_those_of_the_steps_groups_before_any_update(world: World, own: BatchFormat) -> None:
    """Claim: three updates and dropout change no score, and neither replayed nor invalid answers have one."""
    scorer = Scorer(0.7, dropout=0.5)
    found = judged(world, scorer, own=own, updates=3, replayed=REPLAYED)
    keys = [(0, t, r) for t in (PERCEPTION, REASONING) for r in (None, 0, 2)] + [(1, PERCEPTION, r) for r in (None, 0)]
    assert found.scores == {
        (g, tower, r): pytest.approx(0.7 * expected_score(GROUPS[g], tower, r)) for g, tower, r in keys
    }
    assert len(found.results) == 3
    assert scorer.weight.item() != 0.7


@pytest.mark.parametrize(
    ("own", "budget", "ways"),
    [
        (form(), 12, scoring_plan.WAYS),
        (form(), 16, scoring_plan.WAYS),
        (form(), 1000, scoring_plan.WAYS),
        (form(share_prompts=True), 12, scoring_plan.WAYS),
        (form(share_prompts=True), 12, (scoring_plan.apart,)),
        (form(share_prompts=True), 1000, (scoring_plan.apart,)),
    ],
)
def test_the_loss_is_a_mean_over_all_pairs_learnt_from(
    world: World, own: BatchFormat, budget: int, ways: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of the one weight against a loop over each tower's pairs, in one micro-batch or several.

    Scores and slopes of references that are apart travel as fp32.
    """
    scorer = Scorer(1.0)
    monkeypatch.setattr(scoring_plan, "WAYS", ways)
    found = judged(world, scorer, own=own, budget=budget, replayed=REPLAYED)
    assert found.cost.apart == ((own.share_prompts, budget) == (False, 12) or ways == (scoring_plan.apart,))
    assert all((len(batches) > 1) == (budget < 1000) for batches in scorer.passes)
    tolerance = 1e-6 if found.cost.apart else 1e-9
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = torch.zeros((), dtype=torch.float64)
    squares = []
    for tower, num_pairs in ((PERCEPTION, 5), (REASONING, 4)):
        pairs = expected_pairs(tower)
        assert len(pairs) == num_pairs
        for reference, answer in pairs:
            loss = loss - torch.nn.functional.logsigmoid(weight * (reference - answer)) / num_pairs
        squares += [sum((weight * pair[side]) ** 2 for pair in pairs) / num_pairs for side in (0, 1)]
    loss = loss + 0.3 * sum(squares) / 4
    loss.backward()
    assert found.sums["discriminator_loss"] == pytest.approx(float(loss), rel=tolerance)
    assert weight.grad is not None
    assert scorer.weight.item() == pytest.approx(0.5 - float(weight.grad), rel=tolerance)
    assert found.sums["reasoning/pairs"] == 4
    correct = sum((one > other) + 0.5 * (one == other) for one, other in expected_pairs(PERCEPTION))
    assert found.sums["perception/correct"] == correct


@pytest.mark.parametrize("own", [form(), form(share_prompts=True)])
def test_rows_of_a_tower_weigh_one_together(world: World, own: BatchFormat) -> None:
    """References are among the sequences of their tower, once each, whatever micro-batches hold them."""
    scorer = Scorer()
    found = judged(world, scorer, own=own, replayed=REPLAYED)
    totals = [0.0, 0.0]
    for batch in (batch for batches in scorer.passes[found.cost.apart :] for batch in batches):
        assert batch.tower_ids_Q is not None
        for tower, weight in zip(batch.tower_ids_Q.tolist(), batch.extras["sequence_share"].tolist(), strict=True):
            totals[tower] += weight
    assert totals == pytest.approx([1.0, 1.0])


def test_every_update_has_dropout_of_its_own(world: World) -> None:
    """Two steps of two updates each: no key of a judged sequence comes twice, though the sequences do."""
    keys: list[int] = []
    for step in (3, 4):
        scorer = Scorer()
        judged(world, scorer, game=replace(GAME, discriminator_updates_per_step=2), step=step, updates=2, budget=1000)
        assert len(scorer.passes) == 2
        keys += [key for batches in scorer.passes for key in batches[0].extras["dropout_key"].tolist()]
    assert len(keys) == len(set(keys)) == 4 * 8


@pytest.mark.parametrize(
    ("game", "updates", "groups", "calls"),
    [
        (GAME, 1, GROUPS, ["looks", "learns", "learns", "steps"]),
        (GAME, 0, GROUPS, ["looks"] * 2),
        (GAME, 2, [group(response([8], [9]), invalid(10))], ["learns"]),
    ],
)
def test_who_may_not_learn_does_not_step(
    world: World, game: GameConfig, updates: int, groups: Sequence[PreferenceGroup], calls: list[str]
) -> None:
    """Scores are there all the same; without a pair there is no step, which would decay weights."""
    scorer = Scorer()
    found = judged(world, scorer, groups, game, updates=updates)
    assert scorer.calls == [f"discriminator {call}" for call in calls]
    assert found.scores.keys() >= {(0, PERCEPTION, None), (0, REASONING, None)}
    assert (scorer.weight.item() == 1.0) == ("steps" not in calls)


def test_prompts_are_shared_where_load_is_balanced(world: World) -> None:
    scorer = Scorer()
    judged(world, scorer, own=form(share_prompts=True), load_balance=0.5)
    assert all(batch.prefixes and "load_balance_weight" in batch.extras for batch in scorer.passes[0])


def test_cost_counts_padding_and_repetition_apart(world: World) -> None:
    """By hand: slots of a multiple of 4, one group with two valid rollouts.

    Prompt 2, segments with their end tokens: reference 3 and 2, rollouts 2 and 3, and 4 and 2. A reference of 8 slots
    beside rollouts of 4 and 8 is repeated where 16 fit; without the copy it costs another forward pass of 8 + 4.
    """
    unique = 2 * 2 + (3 + 2) + (2 + 3) + (4 + 2)
    references, rollouts = 8 + 4, (4 + 8) + (8 + 4)
    whole = judged(world, Scorer(), GROUPS[:1], own=form(4), budget=32).cost
    assert whole == TrunkCost(references + rollouts, unique, 3 * (references + rollouts), references=2, rollouts=4)
    assert whole.overhead == (references + rollouts) / unique
    apart = judged(world, Scorer(), GROUPS[:1], own=form(4), budget=16).cost
    passes = 4 * references + 3 * rollouts
    assert apart == TrunkCost(2 * references + rollouts, unique, passes, references=2, rollouts=4, apart=True)
    assert apart.passes < 3 * (8 + references + rollouts)
    looked = judged(world, Scorer(), GROUPS[:1], own=form(4), budget=16, updates=0).cost
    assert (looked.passes, looked.overhead) == (references + rollouts, (references + rollouts) / unique)
    shared = judged(world, Scorer(), GROUPS[:1], own=form(4, share_prompts=True), budget=1000).cost
    slots = 2 * 4 + 6 * 4
    assert shared == TrunkCost(slots, unique, 3 * slots, references=2, rollouts=4)


def batch_of_a_group() -> Batch:
    parts = tuple(ScorePart(0, tower, (None, 0, 2)) for tower in (PERCEPTION, REASONING))
    return discriminator_batch(GROUPS, parts, form=form(), seed=1, step=0, sequences_per_tower=(3, 3))[0]


def test_only_the_loss_reads_scores_with_dropout() -> None:
    """Two different rows of scores: rewards and figures are of the first, without a gradient, the loss of the other.

    Two context-parallel ranks report half of each sum.
    """
    batch = batch_of_a_group()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, len(batch.lengths), generator=generator, dtype=torch.float64, requires_grad=True)

    def loss_of(given: torch.Tensor, cp_size: int) -> Any:
        return game_loss(given, batch, pair_counts=(2, 2), regulariser_coefficient=0.3, cp_size=cp_size)

    found = loss_of(scores, 2)
    found.loss.backward()
    assert scores.grad is not None
    assert not scores.grad[0].any()
    assert scores.grad[1].any()
    assert torch.equal(found.rows["scores"], scores[0])
    assert not found.rows["scores"].requires_grad
    dropped, clean = (loss_of(torch.stack([row, row]), 1) for row in (scores[1].detach(), scores[0].detach()))
    assert float(found.loss) == pytest.approx(float(dropped.loss))
    assert float(found.sums["discriminator_loss"]) == pytest.approx(float(dropped.loss) / 2)
    for name, value in clean.sums.items():
        if name != "discriminator_loss":
            assert float(found.sums[name]) == pytest.approx(float(value) / 2), name
    assert float(found.sums["perception/margin"]) != pytest.approx(float(dropped.sums["perception/margin"]) / 2)


def test_a_judgement_tells_what_was_not_finite() -> None:
    """One score is enough, and so is one dropped update, the first of which is the one reported."""
    cost = TrunkCost(0, 1, 0, 1, 0)
    fine, also, dropped = StepResult(1.0, 0.1, True), StepResult(2.0, 0.1, True), StepResult(math.inf, 0.1, False)

    def judgement(scores: Sequence[float], results: Sequence[StepResult]) -> Judgement:
        return Judgement({(0, 0, r): score for r, score in enumerate(scores)}, {}, results, cost)

    assert judgement([1.0, 2.0], []).finite
    assert not judgement([1.0, math.nan], []).finite
    assert not judgement([-math.inf, 1.0], []).finite
    assert judgement([], []).result is None
    assert judgement([], [fine, also]).result == also
    assert judgement([], [fine, dropped, also]).result == dropped
