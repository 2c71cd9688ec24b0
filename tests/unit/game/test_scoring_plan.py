"""Plans of a discriminator's pass: what they hold for any lengths, and what they cost at the paper's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.game import scoring_plan
from prism_megatron.game.judged_rows import ScoreMicroBatch, judged_sequences
from prism_megatron.game.scoring_plan import ScoringPlan, plan_scoring
from prism_megatron.game.scoring_plan import apart as plan_apart
from prism_megatron.game.scoring_plan import beside as plan_beside
from prism_megatron.training.microbatches import of_rank
from prism_megatron.types import RolloutGroup
from tests.unit.game.tiny_game import form, group, invalid, response, rollout

LENGTHS = st.integers(1, 9)
ANSWERS = st.lists(st.tuples(LENGTHS, LENGTHS, st.booleans()), max_size=6)
GROUPS = st.lists(st.tuples(LENGTHS, LENGTHS, st.integers(0, 9), ANSWERS), min_size=1, max_size=4)

Drawn = tuple[int, int, int, list[tuple[int, int, bool]]]
"""Lengths of a group's prompt, caption and reasoning, the same of its answers, and whether each is valid."""


def answer(caption: int, reasoning: int) -> tuple[list[int], list[int]]:
    return [8] * caption, [9] * reasoning


def groups_of(drawn: Sequence[Drawn]) -> list[RolloutGroup]:
    return [
        group(
            response(*answer(caption, reasoning)),
            *(rollout(*answer(c, r)) if valid else invalid(8, 9) for c, r, valid in answers),
            prompt=[5] * prompt,
        )
        for prompt, caption, reasoning, answers in drawn
    ]


@settings(deadline=None, max_examples=60)
@given(GROUPS, st.integers(1, 60), st.integers(1, 4), st.booleans(), st.sampled_from([plan_beside, plan_apart]))
def test_everything_is_run_and_counted_once(
    drawn: Sequence[Drawn], budget: int, rounds: int, shares: bool, way: object
) -> None:
    """Every valid rollout learns once, and so does every group's reference in each tower, whatever is repeated.

    Numbers of micro-batches fill whole rounds; a rollout has its reference beside it, or all are apart; the tokens that
    are counted are those of the rows that are built.
    """
    groups, own = groups_of(drawn), form(2, share_prompts=shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_plan, "WAYS", (way,))
        plan = plan_scoring(groups, own, tokens_per_microbatch=budget, rounds_of=rounds)
    units = [(g, tower) for g, one in enumerate(groups) for tower in one.towers]
    parts = [part for parts in (*plan.pairs, *plan.references) for part in parts]
    assert Counter((p.group, p.tower, r) for p in parts for r in p.answers if r is not None) == Counter(
        (g, tower, r) for g, tower in units for r in groups[g].valid_rollouts
    )
    counted = Counter((p.group, p.tower) for p in parts if None in p.answers and not p.repeated)
    assert counted == Counter(units)
    assert len(plan.pairs) % rounds == len(plan.references) % rounds == 0
    for part in (part for parts in plan.pairs for part in parts):
        assert (None in part.answers) != plan.cost.apart or part.repeated
    slots = {
        name: sum(own.slot(len(row.tokens.token_ids)) for parts in of for row in judged_sequences(groups, parts, own))
        for name, of in (("pairs", plan.pairs), ("references", plan.references))
    }
    assert plan.cost.trunk_tokens == slots["pairs"] + 2 * slots["references"]
    assert plan.cost.passes == 3 * slots["pairs"] + 4 * slots["references"]
    assert plan.cost.overhead >= 1.0


def long_answers(seed: int | None) -> list[RolloutGroup]:
    """4 groups of 16 at the paper's lengths, all alike, or as they come: half to one and a half times as long."""
    draw = random.Random(seed)

    def drawn(length: int) -> int:
        return length if seed is None else round(length * draw.uniform(0.5, 1.5))

    return groups_of(
        [(drawn(1500), drawn(400), drawn(4500), [(drawn(400), drawn(4500), True) for _ in range(16)]) for _ in range(4)]
    )


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize(("budget", "limit"), [(16_384, 1.6), (65_536, 1.35)])
def test_long_answers_cost_little_more_than_each_token_once(seed: int | None, budget: int, limit: float) -> None:
    """Claim: passes over slots are within 1.6 and 1.35 times the least; which way is cheaper depends on the budget.

    Load balancing changes nothing of a plan. (With a copy of prompt and reference for both towers in every micro-batch
    it was 1.9 and 1.2; with every sequence whole, as Transformer Engine's attention wants them, 2.9 and 1.7.)
    """
    groups = long_answers(seed)
    plan = plan_scoring(groups, form(64, share_prompts=True), tokens_per_microbatch=budget, rounds_of=1)
    print(f"{plan.cost.overhead:.3f} of the least, references {'apart' if plan.cost.apart else 'beside'}")
    assert plan.cost.overhead <= limit


def test_the_cheaper_way_is_taken() -> None:
    """Claim: apart at the paper's lengths in 16k tokens, beside where whole groups fit."""
    groups = long_answers(None)

    def plan(budget: int) -> ScoringPlan:
        return plan_scoring(groups, form(64, share_prompts=True), tokens_per_microbatch=budget, rounds_of=1)

    few, many = plan(16_384), plan(400_000)
    assert few.cost.apart and few.references
    assert not many.cost.apart and not many.references


@pytest.mark.parametrize(("budget", "ranks"), [(16_384, 1), (32_768, 8), (32_768, 16), (65_536, 4), (16_384, 64)])
def test_no_way_would_be_done_sooner(budget: int, ranks: int) -> None:
    """Claim: of both ways the one is taken for whose busiest ranks the others wait less, which need not be the one with
    fewer passes in all. Every rank's share is counted here row by row.
    """
    groups, own = long_answers(None), form(64, share_prompts=True)

    def slots(parts: Sequence[ScoreMicroBatch]) -> int:
        rows = (row for one in parts for row in judged_sequences(groups, one, own))
        return sum(own.slot(len(row.tokens.token_ids)) for row in rows)

    def waited(plan: ScoringPlan) -> int:
        return 3 * max(slots(of_rank(plan.pairs, dp_rank=r, dp_size=ranks)) for r in range(ranks)) + 4 * max(
            slots(of_rank(plan.references, dp_rank=r, dp_size=ranks)) for r in range(ranks)
        )

    taken = plan_scoring(groups, own, tokens_per_microbatch=budget, rounds_of=ranks, ranks=ranks)
    ways = {}
    for way in scoring_plan.WAYS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring_plan, "WAYS", (way,))
            ways[way] = plan_scoring(groups, own, tokens_per_microbatch=budget, rounds_of=ranks, ranks=ranks)
    assert waited(taken) == min(map(waited, ways.values())) == taken.busiest
    fewest = min(ways.values(), key=lambda plan: plan.cost.passes)
    assert (fewest.cost.apart != taken.cost.apart) == ((budget, ranks) in {(32_768, 16), (65_536, 4), (16_384, 64)})
