"""Scores become advantages, and advantages credit for tokens, as the rules of the game say, none of them a default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from prism_megatron.advantages import GroupAdvantages, joint_advantages, per_expert_advantages
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.game.credit import credit_groups, group_advantages, token_advantages
from prism_megatron.game.judge import Judgement
from prism_megatron.game.scoring_plan import TrunkCost
from prism_megatron.types import TOWERS, RolloutGroup, VersionSpan
from tests.unit.game.tiny_game import group, invalid, response, rollout

NAN = math.nan
GAME = GameConfig(alpha=0.3, score_clip=2.0, format_penalty=0.7)
ANSWERS = (rollout([8], [9]), invalid(10), rollout([11], [12]), rollout([13], [14]))
GROUPS = [
    group(response([8], [9]), rollout([8], [9])),
    group(response([8], [9]), *ANSWERS),
    group(response([8]), *ANSWERS),
]
SCORES = {
    (0, 0): [9.0],
    (0, 1): [9.0],
    (1, 0): [1.0, NAN, -3.0, 0.5],
    (1, 1): [0.2, NAN, 0.9, -1.4],
    (2, 0): [4.0, NAN, -1.0, 0.0],
}
"""by group and tower, for each rollout"""
VALID = torch.tensor([True, False, True, True])


def judgement(scores: Mapping[tuple[int, int], list[float]]) -> Judgement:
    """Of these scores; references have some, and invalid rollouts none."""
    by_rollout: dict[tuple[int, int, int | None], float] = {(*key, None): 5.0 for key in scores}
    by_rollout |= {
        (*key, r): score for key, own in scores.items() for r, score in enumerate(own) if not math.isnan(score)
    }
    return Judgement(by_rollout, {}, [], TrunkCost(0, 1, 0, 1, 0))


def advantages_of(g: int, game: GameConfig, given: Judgement | None = None) -> GroupAdvantages:
    return group_advantages(GROUPS[g], g, given or judgement(SCORES), game, seed=3, step=7)


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_length_scores_are_lengths_whatever_the_discriminator_says() -> None:
    """Claim: the longest segment of its group scores 1, others their share of it, each tower by its own segment."""
    answers = (rollout([8, 8, 8], [9]), invalid(10), rollout([11], [12, 12]), rollout([13], [14]))
    asked = group(response([8], [9]), *answers)
    spans = [[answer.segments.of_tower(tower) for answer in answers] for tower in TOWERS]
    lengths = [[NAN if span is None else span.end - span.start for span in of_tower] for of_tower in spans]
    shares = torch.tensor(lengths, dtype=torch.float64)
    shares /= shares.nan_to_num().amax(dim=1, keepdim=True)
    game = replace(GAME, length_scores=True)
    found = group_advantages(asked, 1, judgement(SCORES), game, seed=3, step=7)
    expected = per_expert_advantages(
        shares[0], shares[1], VALID, alpha=0.3, score_clip=2.0, format_penalty=0.7, all_invalid="zero"
    )
    same(found.perception_N, expected.perception_N)
    same(found.reasoning_N, expected.reasoning_N)
    assert found.perception_N is not None and found.reasoning_N is not None
    assert found.perception_N[0] > found.perception_N[2] and found.reasoning_N[2] > found.reasoning_N[0]


@pytest.mark.parametrize(("name", "form"), [("per_expert", per_expert_advantages), ("joint", joint_advantages)])
def test_every_rule_of_the_game_reaches_the_advantages(name: Any, form: Any) -> None:
    """Claim: alpha, clip, penalty and form are the game's, and scores are those of the own group and towers."""
    found = advantages_of(1, replace(GAME, advantage=name))
    perception, reasoning = (torch.tensor(SCORES[1, tower], dtype=torch.float64) for tower in (0, 1))
    expected = form(perception, reasoning, VALID, alpha=0.3, score_clip=2.0, format_penalty=0.7)
    same(found.mixed_N, expected.mixed_N)
    assert (found.num_valid, found.num_clipped_scores) == (3, 1)


def test_a_group_that_reasoning_does_not_judge_has_perceptions_advantage() -> None:
    found = advantages_of(2, GAME)
    expected = per_expert_advantages(torch.tensor(SCORES[2, 0]), None, VALID, score_clip=2.0, format_penalty=0.7)
    assert found.reasoning_N is None
    same(found.mixed_N, expected.mixed_N)
    same(found.mixed_N, found.perception_N)


def test_a_group_without_a_valid_rollout_gets_what_the_game_says() -> None:
    lost = group(response([8], [9]), invalid(10), invalid(11))
    for rule, expected in (("zero", 0.0), ("release", -0.7)):
        game = replace(GAME, all_invalid_group=rule)  # type: ignore[arg-type]
        assert group_advantages(lost, 0, judgement({}), game, seed=3, step=7).mixed_N.tolist() == [expected] * 2


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_scores_that_are_not_finite_reward_nothing(bad: float) -> None:
    """Claim: one such score, of another group even, and no rollout of the step counts as valid."""
    scores = {**judgement(SCORES).scores, (0, 1, 0): bad}
    found = advantages_of(1, GAME, replace(judgement(SCORES), scores=scores))
    assert found.all_invalid
    assert found.mixed_N.tolist() == [0.0] * 4


def order(group_number: int, *, seed: int = 3, step: int = 7, shuffle: bool = True) -> list[int]:
    """Whose scores the eight valid ones of ten rollouts got. All scores differ, alike in both towers."""
    answers = [rollout([8], [9]) if r not in (2, 5) else invalid(10) for r in range(10)]
    one = group(response([8], [9]), *answers)
    scores = {(group_number, tower): [float(r) if r not in (2, 5) else NAN for r in range(10)] for tower in (0, 1)}
    game = GameConfig(shuffle_scores=shuffle)
    found = group_advantages(one, group_number, judgement(scores), game, seed=seed, step=step)
    same(found.perception_N, found.reasoning_N)
    valid = [r for r in range(10) if r not in (2, 5)]
    by_advantage = sorted(valid, key=lambda r: float(found.mixed_N[r]))
    return [valid[by_advantage.index(r)] for r in valid]


def test_shuffled_scores_stay_in_their_group_and_lose_their_owners() -> None:
    """A permutation of the valid rollouts' scores, of both towers together, by seed, step and group."""
    valid = [0, 1, 3, 4, 6, 7, 8, 9]
    assert order(1, shuffle=False) == valid
    found = [order(1), order(2), order(1, step=8), order(1, seed=4)]
    assert found[0] == order(1)
    assert all(sorted(one) == valid != one for one in found)
    assert len({tuple(one) for one in found}) == 4


def test_rewards_name_who_judged_and_the_oldest_policy_that_drew() -> None:
    versions = [VersionSpan(4, 0, 1), VersionSpan(2, 1, 2), VersionSpan(6, 2, 3)]
    drawn = group(response([8], [9]), rollout([8], [9], versions=versions), rollout([8], [9]))
    scores = {(g, tower): [1.0, 2.0] for g in (0, 1) for tower in (0, 1)}
    rewards = credit_groups([drawn, drawn], judgement(scores), GAME, seed=3, step=7, version=5)
    assert [(reward.discriminator_version, reward.policy_versions) for reward in rewards] == [(5, (2, 0))] * 2
    expected = group_advantages(drawn, 1, judgement(scores), GAME, seed=3, step=7)
    same(rewards[1].advantages.mixed_N, expected.mixed_N)


def credit(own: RolloutGroup, rule: Any, *, reasoning: bool = True) -> list[list[float]]:
    """Of each rollout of a group whose advantages are told apart: mixed 1, 2; perception 10, 20; reasoning 100, 200."""
    mixed, perception, other = (torch.tensor([1.0, 2.0]) * scale for scale in (1, 10, 100))
    given = GroupAdvantages(mixed, perception, other if reasoning else None, 2, 0, 0)
    return [token_advantages(one, r, given, GameConfig(credit=rule)) for r, one in enumerate(own.rollouts)]


def test_credit_goes_to_the_tokens_of_each_segment() -> None:
    """A caption of three tokens and two more: p p p r r, with the end token in the rest."""
    own = group(response([8], [9]), rollout([8, 9, 10], [11]), rollout([8], [9, 10]))
    assert credit(own, "segment") == [[10, 10, 10, 100, 100], [20, 200, 200, 200]]
    assert credit(own, "segment", reasoning=False) == [[10, 10, 10, 0, 0], [20, 0, 0, 0]]
    assert credit(own, "response") == [[1] * 5, [2] * 4]


def test_a_rollout_without_segments_has_one_credit() -> None:
    assert credit(group(response([8], [9]), invalid(8, 9, 10), rollout([8], [9])), "segment") == [
        [1] * 3,
        [20, 200, 200],
    ]


def test_scores_are_as_fine_as_their_judgement_says() -> None:
    """Claim: what a discriminator's dtype does not tell apart is no contrast; for a finer one it is."""
    pair = group(response([8]), rollout([8], [9]), rollout([11], [12]))
    flat = [
        group_advantages(
            pair, 0, replace(judgement({(0, 0): [4.0, 4.01]}), rounding=rounding), GameConfig(), seed=3, step=7
        ).num_flat
        for rounding in (1e-5, 2.0**-7)
    ]
    assert flat == [0, 1]
