"""Advantages against a slow twin of docs/method.md, section 5, and their properties."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from random import Random
from typing import Literal, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prism_megatron.advantages import (
    ROUNDING,
    GroupAdvantages,
    joint_advantages,
    overlong_penalty,
    per_expert_advantages,
    reward_advantages,
)

score = st.floats(-15, 15, allow_nan=False)
groups = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(score, min_size=n, max_size=n),
        st.lists(score, min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)
Group = tuple[list[float], list[float], list[bool]]
FORMS = [per_expert_advantages, joint_advantages]


def result(group: Group, form: Callable[..., GroupAdvantages] = per_expert_advantages) -> GroupAdvantages:
    perception, reasoning, valid = group
    return form(
        torch.tensor(perception, dtype=torch.float64), torch.tensor(reasoning, dtype=torch.float64), torch.tensor(valid)
    )


def advantages(group: Group, form: Callable[..., GroupAdvantages] = per_expert_advantages) -> torch.Tensor:
    return result(group, form).mixed_N


def clip(score: float) -> float:
    return max(-10.0, min(10.0, score))


def slow_normalise(scores: list[float], valid: list[bool]) -> list[float]:
    clipped = [clip(s) for s in scores]
    lowest = min((s for s, ok in zip(clipped, valid, strict=True) if ok), default=0.0)
    filled = [s if ok else lowest - 1.0 for s, ok in zip(clipped, valid, strict=True)]
    if len(filled) > 1 and max(filled) - min(filled) <= 1e-5 * max(1.0, *(abs(s) for s in filled)):
        return [0.0] * len(filled)
    mean, std = (statistics.fmean(filled), statistics.stdev(filled)) if len(filled) > 1 else (0.0, 1.0)
    return [(s - mean) / (std + 1e-6) for s in filled]


@settings(deadline=None, max_examples=80)
@given(groups)
def test_equals_the_method_written_out(group: Group) -> None:
    """Clip, substitute, normalise, mix, penalise: to 1e-7 of a pure Python twin."""
    perception, reasoning, valid = group
    expected = [
        0.5 * v + 0.5 * r - 1.5 * (not ok)
        for v, r, ok in zip(slow_normalise(perception, valid), slow_normalise(reasoning, valid), valid, strict=True)
    ]
    if not any(valid):
        expected = [0.0] * len(valid)
    torch.testing.assert_close(advantages(group), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("scores", "equal"),
    [
        ([3.0, 3.0, 3.0 + 2e-7], True),
        ([0.0, 1e-5, 0.0], True),  # the bound itself
        ([0.0, 1.1e-5, 0.0], False),
        ([-1e-6, 3e-6, 1e-6], True),  # near 0 it is absolute
        ([9.0, 9.00008, 9.0], True),  # elsewhere relative
        ([-9.0, -9.00008, -9.0], True),
        ([9.0, 9.0001, 9.0], False),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_no_contrast(form: Callable[..., GroupAdvantages], scores: list[float], equal: bool) -> None:
    """Scores that differ by at most 1e-5, or that share of the largest, get 0; all others their full contrast."""
    found = result((scores, scores, [True] * 3), form)
    assert float(found.mixed_N.abs().max()) == (0.0 if equal else pytest.approx(1.1547, abs=0.2))
    assert found.num_flat == equal * (2 if form is per_expert_advantages else 1)


@pytest.mark.parametrize(
    ("scores", "equal"),
    [
        ([4.375, 4.375 + 2.0**-5, 4.375], True),  # one unit in the last place of a bfloat16 between 4 and 8
        ([4.4, 4.4 + 3.3e-3 * 4.4, 4.4], True),  # the most that was measured
        ([4.375, 4.375 + 2.0**-4, 4.375], False),
        ([0.5, 0.5 + 2.0**-7, 0.5], True),  # near 0 it is absolute
        ([0.5, 0.5 + 2.0**-6, 0.5], False),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_bfloat16_does_not_tell_apart_is_no_contrast(
    form: Callable[..., GroupAdvantages], scores: list[float], equal: bool
) -> None:
    """Claim: the bound is the dtype's of the scores: what is noise of a bfloat16 is a contrast in float32."""
    given = torch.tensor(scores, dtype=torch.float64)
    coarse = form(given, given, torch.tensor([True] * 3), rounding=ROUNDING[torch.bfloat16])
    assert float(coarse.mixed_N.abs().max()) == (0.0 if equal else pytest.approx(1.1547, abs=0.01))
    fine = form(given, given, torch.tensor([True] * 3), rounding=ROUNDING[torch.float32])
    assert float(fine.mixed_N.abs().max()) == pytest.approx(1.1547, abs=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_only_groups_that_could_have_a_contrast_are_flat(form: Callable[..., GroupAdvantages]) -> None:
    """One rollout alone, and invalid ones alone, which all have the same reward, are counted elsewhere."""
    assert result(([1.0], [2.0], [True]), form).num_flat == 0
    assert result(([1.0, 2.0], [3.0, 4.0], [False, False]), form).num_flat == 0


@pytest.mark.parametrize("form", FORMS)
def test_clipped_scores_are_those_of_valid_rollouts_beyond_the_bound(form: Callable[..., GroupAdvantages]) -> None:
    """A score at the bound is inside; what an invalid rollout was given says nothing."""
    scores = torch.tensor([3.0, -3.0, 3.1, -3.1, 50.0], dtype=torch.float64)
    valid = torch.tensor([True, True, True, True, False])
    found = form(scores, torch.zeros(5), valid, score_clip=3.0)
    assert found.num_clipped_scores == 2
    torch.testing.assert_close(found.mixed_N, form(scores.clamp(-3, 3), torch.zeros(5), valid).mixed_N)


@pytest.mark.parametrize("form", FORMS)
def test_the_penalty_is_taken_from_invalid_rollouts_to_the_last_place(form: Callable[..., GroupAdvantages]) -> None:
    """Float64 all through: 0.7 is no number of float32."""
    nan = torch.full((2,), math.nan)
    found = form(nan, nan, torch.zeros(2, dtype=torch.bool), format_penalty=0.7, all_invalid="release")
    assert found.mixed_N.tolist() == [-0.7, -0.7]
    scores, valid = torch.tensor([1.0, 3.0, math.nan]), torch.tensor([True, True, False])
    lost = (
        form(scores, scores, valid, format_penalty=0.0).mixed_N
        - form(scores, scores, valid, format_penalty=0.7).mixed_N
    )
    assert lost.tolist() == pytest.approx([0.0, 0.0, 0.7], abs=1e-15)


@settings(deadline=None, max_examples=80)
@given(groups)
def test_joint_equals_the_paper_written_out(group: Group) -> None:
    """Clip each, mix, substitute, normalise: to 1e-7 of a pure Python twin, without a penalty."""
    perception, reasoning, valid = group
    mixed = [0.5 * clip(v) + 0.5 * clip(r) for v, r in zip(perception, reasoning, strict=True)]
    expected = slow_normalise(mixed, valid) if any(valid) else [0.0] * len(valid)
    torch.testing.assert_close(
        advantages(group, joint_advantages), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(group=groups, random=st.randoms(use_true_random=False))
def test_permuting_rollouts_permutes_advantages(
    form: Callable[..., GroupAdvantages], group: Group, random: Random
) -> None:
    """The order of a group does not matter, to 1e-7."""
    order = list(range(len(group[2])))
    random.shuffle(order)
    permuted = ([group[0][i] for i in order], [group[1][i] for i in order], [group[2][i] for i in order])
    torch.testing.assert_close(advantages(permuted, form), advantages(group, form)[order], rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=40)
@given(group=groups, shift=st.integers(-4, 4))
def test_a_shift_of_one_tower_changes_nothing(form: Callable[..., GroupAdvantages], group: Group, shift: int) -> None:
    """Adding a constant to a tower's scores, short of the clip, moves no advantage of n > 1 by more than 1e-7.

    Scores are multiples of 1/64: sums of others round, and what is equal before the shift must stay so.
    """
    assume(len(group[2]) > 1)
    small = ([round(s * 16) / 64 for s in group[0]], [round(s * 16) / 64 for s in group[1]], group[2])
    shifted = ([s + shift for s in small[0]], small[1], group[2])
    torch.testing.assert_close(advantages(shifted, form), advantages(small, form), rtol=0, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(groups)
def test_joint_advantages_have_unit_variance(group: Group) -> None:
    """Mean 0 and standard deviation 1, whatever the towers' scales, unless the rewards are all the same."""
    given = result(group, joint_advantages)
    assume(len(group[2]) > 1 and any(group[2]) and not given.num_flat)
    assert float(given.mixed_N.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(given.mixed_N.std()) == pytest.approx(1.0, abs=0.1)
    assert given.perception_N is None
    assert given.reasoning_N is None


def test_the_tower_with_the_larger_spread_decides_jointly() -> None:
    """Claim: the forms differ as the method says: jointly the wide tower wins, per expert both count alike."""
    group = ([0.0, 1.0], [9.0, 0.0], [True, True])
    assert advantages(group).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert advantages(group, joint_advantages).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_valid_rollout_stands_above_the_others(form: Callable[..., GroupAdvantages]) -> None:
    """Among three answers the only valid one gets 2/sqrt(3) of a standard deviation, whatever its score; counted."""
    given = result(([-3.0, math.nan, math.nan], [7.0, math.nan, math.nan], [True, False, False]), form)
    assert given.num_valid == 1
    assert given.num_flat == 0
    assert float(given.mixed_N[0]) == pytest.approx(2 / 3**0.5, abs=1e-4)


def test_all_invalid_group_as_released() -> None:
    """Every rollout loses the penalty, with no contrast between them."""
    nan = torch.full((3,), math.nan)
    given = per_expert_advantages(nan, nan, torch.zeros(3, dtype=torch.bool), all_invalid="release")
    assert given.mixed_N.tolist() == [-1.5] * 3


def test_all_invalid_group_is_zero_and_counted() -> None:
    """No valid rollout, scores NaN: advantages 0, not an uncentred push."""
    nan = torch.full((3,), math.nan)
    given = per_expert_advantages(nan, nan, torch.zeros(3, dtype=torch.bool))
    assert given.all_invalid
    assert given.num_valid == 0
    assert given.mixed_N.tolist() == [0.0, 0.0, 0.0]


def test_towers_mix_linearly_and_penalty_stands_in_each() -> None:
    """mixed = alpha * perception + (1 - alpha) * reasoning, penalty included once."""
    given = per_expert_advantages(
        torch.tensor([1.0, 2.0, math.nan]),
        torch.tensor([0.0, 5.0, math.nan]),
        torch.tensor([True, True, False]),
        alpha=0.25,
    )
    assert given.perception_N is not None
    assert given.reasoning_N is not None
    torch.testing.assert_close(given.mixed_N, 0.25 * given.perception_N + 0.75 * given.reasoning_N)
    # Perception is [1, 2, 0] after substitution: mean 1, std 1.
    torch.testing.assert_close(
        given.perception_N, torch.tensor([0.0, 1.0, -2.5], dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert given.num_valid == 2


def test_perception_alone() -> None:
    """Without reasoning scores the mixed advantage is the perception advantage, not half of it."""
    given = per_expert_advantages(torch.tensor([1.0, 3.0]), None, torch.tensor([True, True]))
    assert given.reasoning_N is None
    torch.testing.assert_close(
        given.mixed_N, torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(2.0), rtol=0, atol=1e-5
    )


def test_zero_variance_and_clipping() -> None:
    """Equal scores give 0; scores beyond the clip become equal and are counted."""
    given = per_expert_advantages(torch.tensor([11.0, 14.0]), torch.tensor([2.0, 2.0]), torch.tensor([True, True]))
    assert given.mixed_N.tolist() == [0.0, 0.0]
    assert given.num_clipped_scores == 2
    assert given.num_flat == 2


def test_a_valid_rollout_with_nan_is_refused() -> None:
    """A diverged discriminator stops the run; it is never replaced by a number."""
    with pytest.raises(ValueError, match="not finite"):
        per_expert_advantages(torch.tensor([math.nan, 1.0]), None, torch.tensor([True, True]))


def slow_normalised(rewards: list[float]) -> list[float]:
    if len(rewards) == 1:
        return [rewards[0] / (1 + 1e-6)]
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-6) for r in rewards]


def slow_advantages(groups_: list[list[list[float]]], weights: list[float], form: str) -> list[list[float]]:
    """By group, from rewards by group, kind and rollout."""
    made = []
    for rewards in groups_:
        mixed = [sum(w * r[i] for w, r in zip(weights, rewards, strict=True)) for i in range(len(rewards[0]))]
        if form == "group":
            made.append(slow_normalised(mixed))
        elif form == "group-mean":
            mean = sum(mixed) / len(mixed)
            made.append([0.0 if len(mixed) == 1 else r - mean for r in mixed])
        else:
            own = [slow_normalised(r) if len(r) > 1 else [0.0] for r in rewards]
            made.append([sum(w * a[i] for w, a in zip(weights, own, strict=True)) for i in range(len(mixed))])
    if form != "gdpo":
        return made
    whole = [a for group in made for a in group]
    if max(whole) == min(whole):
        return [[0.0] * len(group) for group in made]
    mean = sum(whole) / len(whole)
    std = math.sqrt(sum((a - mean) ** 2 for a in whole) / (len(whole) - 1))
    return [[(a - mean) / (std + 1e-6) for a in group] for group in made]


RewardForm = Literal["group", "group-mean", "gdpo"]
FORMS_OF_REWARDS: tuple[RewardForm, ...] = get_args(RewardForm)


@pytest.mark.parametrize("form", FORMS_OF_REWARDS)
def test_advantages_of_rewards_equal_their_twin(form: RewardForm) -> None:
    """Claim: 200 batches of ragged groups with two rewards, of which many are equal, to 1e-12."""
    random = Random(5)
    flat = 0
    for _ in range(200):
        batch = []
        for _ in range(random.randint(1, 5)):
            n = random.randint(1, 6)
            batch.append(
                [[float(random.randint(0, 2)) for _ in range(n)], [random.choice([0.0, 1.0]) for _ in range(n)]]
            )
        expected = slow_advantages(batch, [0.8, 0.2], form)
        found = reward_advantages([torch.tensor(one) for one in batch], [0.8, 0.2], form=form)
        for mine, wanted in zip(found, expected, strict=True):
            assert mine.tolist() == pytest.approx(wanted, abs=1e-12)
        flat += sum(all(a == 0 for a in one.tolist()) for one in found)
    assert form == "gdpo" or flat > 10


def test_gdpo_tells_mixtures_apart_that_a_sum_does_not() -> None:
    """By hand: rewards (1, 0) and (0, 1) have the same sum, and the rarer one is worth more where weights differ."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    together, apart = (reward_advantages([rewards], [1.0, 1.0], form=form)[0] for form in FORMS_OF_REWARDS[::2])
    assert together.tolist() == [0.0] * 4
    assert apart.tolist() == [0.0] * 4, "one rises exactly as the other falls"
    apart = reward_advantages([rewards], [1.0, 0.5], form="gdpo")[0]
    assert apart[0] > 0 > apart[1]
    assert float(apart.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(apart.std()) == pytest.approx(1.0, rel=1e-5)


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        reward_advantages([torch.tensor([[1.0, math.nan]])], [1.0], form="group")


def test_answers_that_are_too_long_are_punished_little_by_little() -> None:
    """DAPO's numbers: 20480 tokens at most, of which the last 4096 cost up to 1."""
    found = [overlong_penalty(n, longest=20480, buffer=4096) for n in (10, 16384, 17408, 18432, 20480, 30000)]
    assert found == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    assert overlong_penalty(9, longest=10, buffer=2, factor=3.0) == -1.5
    with pytest.raises(ValueError, match="buffer of 11 tokens is not within"):
        overlong_penalty(1, longest=10, buffer=11)
