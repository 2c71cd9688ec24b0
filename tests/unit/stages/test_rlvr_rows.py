"""A step's row and what is said below it, from answers that are known."""

from __future__ import annotations

from typing import Any

import pytest

from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.sampling.exam import NOT_ASKED, Sitting
from prism_megatron.sampling.queue import SampledStep, Staleness
from prism_megatron.stages.rlvr.credit import Crediting
from prism_megatron.stages.rlvr.plan import RLVRPlan
from prism_megatron.stages.rlvr.prospect import Found, RewardedGroup
from prism_megatron.stages.rlvr.rows import RLVRStep, outcome_of, step_row
from prism_megatron.training.policy_update import UpdatePlan
from tests.unit.stages.tiny_rewards import group, rewarded

MIXED, RIGHT, WRONG = group([True, False]), group([True, True]), group([False, False], lengths=[3, 5])


def plan(*, wanted: int, mini_batches: int = 1) -> RLVRPlan:
    form: Any = None
    return RLVRPlan(
        Crediting("group", 10, 0, 1.0),
        UpdatePlan(PolicyObjective(family="clipped", mini_batches=mini_batches), form, 100),
        steps=10,
        prompts_per_step=wanted,
        rollouts_per_prompt=2,
        logprob_gap_alarm=0.05,
    )


def batch(*groups: RewardedGroup, mean: float = 0.0, largest: int = 0) -> SampledStep:
    return SampledStep([one.example for one in groups], [one.group for one in groups], 7,
                       Staleness(mean, largest, 0.0), [one.rewards for one in groups])  # fmt: skip


def step(*, update: Any = None, held_out: Sitting = NOT_ASKED) -> RLVRStep:
    batches = [batch(MIXED, RIGHT, mean=1.0, largest=2), batch(WRONG)]
    found = Found([MIXED], [MIXED, RIGHT, WRONG], batches, surplus=0)
    return RLVRStep(3, found, [[1.0, 0.2]], update, held_out)


def test_a_row_counts_all_answers_that_were_asked() -> None:
    """Claim: 3 of 6 answers are right, in 20 tokens; staleness is weighted by answers; one group was learned from."""
    row = step_row(step(held_out=Sitting({"eval/prompts": 2}, best=False)))
    wanted = {
        "step": 3, "rollouts": 6, "response_tokens": 20, "valid_share": 1.0, "reward/accuracy": 0.5,
        "reward/mean": 0.6, "reward/learned": 2, "groups": 3, "groups/learned": 1, "groups/mixed": 1,
        "groups/all_right": 1, "groups/none_right": 1, "groups/surplus": 0, "groups/batches": 2,
        "staleness/mean": pytest.approx(4 / 6), "staleness/max": 2, "policy_version": 7, "eval/prompts": 2,
        "policy_updated": None,
    }  # fmt: skip
    assert {name: row[name] for name in wanted} == wanted


def test_checks_that_were_ended_or_guarded_are_counted() -> None:
    odd = RewardedGroup(MIXED.example, MIXED.group, [rewarded(False, reason="killed: 1 s"),
                                                     rewarded(False, valid=False, reason="guarded: long")])  # fmt: skip
    row = step_row(RLVRStep(0, Found([], [odd], [batch(odd)], 0), [], None, NOT_ASKED))
    assert (row["reward/killed"], row["reward/guarded"], row["valid_rollouts"], row["reward/mean"]) == (1, 1, 1, None)


def test_a_step_without_contrast_is_idle_and_says_so_once() -> None:
    outcome = outcome_of(step(), plan(wanted=2))
    assert outcome.learned == () and "different worth" in outcome.idle["policy"]
    (line,) = outcome.lines
    assert line.startswith("step 4: 1 of 2 groups after 2 batches of prompts: of 3 groups 1 are all right and 1 all")
    assert outcome_of(step(), plan(wanted=1)).lines == []


def test_a_step_that_is_the_best_says_so() -> None:
    assert outcome_of(step(held_out=Sitting({}, best=True)), plan(wanted=1)).best
    assert not outcome_of(step(), plan(wanted=1)).best


@pytest.mark.parametrize(("groups", "updates"), [(8, 4), (2, 4), (1, 2), (0, 1)])
def test_fewer_groups_are_fewer_mini_batches(groups: int, updates: int) -> None:
    """Claim: two answers a group; each mini-batch has one at least."""
    assert plan(wanted=8, mini_batches=4).learning_from(groups).objective.mini_batches == updates
