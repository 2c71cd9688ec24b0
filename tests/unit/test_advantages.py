"""Advantages against a slow twin of method notes 4.3, and their properties."""

from __future__ import annotations

import math
import statistics
from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prism_megatron.advantages import per_expert_advantages

score = st.floats(-15, 15, allow_nan=False)
groups = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(score, min_size=n, max_size=n),
        st.lists(score, min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)
Group = tuple[list[float], list[float], list[bool]]


def advantages(group: Group) -> torch.Tensor:
    perception, reasoning, valid = group
    return per_expert_advantages(
        torch.tensor(perception, dtype=torch.float64), torch.tensor(reasoning, dtype=torch.float64), torch.tensor(valid)
    ).mixed_N


def slow_normalise(scores: list[float], valid: list[bool]) -> list[float]:
    clipped = [max(-10.0, min(10.0, s)) for s in scores]
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


def test_rounding_is_no_contrast() -> None:
    """Equal texts whose scores differ in float32's last places get 0, a difference of 1e-3 the full contrast."""
    for difference, expected in ((2e-7, 0.0), (1e-3, 1.1547)):
        scores = [3.0, 3.0, 3.0 + difference]
        largest = float(advantages((scores, scores, [True] * 3)).abs().max())
        assert largest == pytest.approx(expected, abs=0.01)


@settings(deadline=None, max_examples=40)
@given(groups, st.randoms(use_true_random=False))
def test_permuting_rollouts_permutes_advantages(group: Group, random: Random) -> None:
    """The order of a group does not matter, to 1e-7."""
    order = list(range(len(group[2])))
    random.shuffle(order)
    permuted = ([group[0][i] for i in order], [group[1][i] for i in order], [group[2][i] for i in order])
    torch.testing.assert_close(advantages(permuted), advantages(group)[order], rtol=0, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(groups, st.integers(-4, 4))
def test_a_shift_of_one_tower_changes_nothing(group: Group, shift: int) -> None:
    """Adding a constant to a tower's scores, short of the clip, moves no advantage of n > 1 by more than 1e-7."""
    assume(len(group[2]) > 1)
    small = ([s * 0.25 for s in group[0]], group[1], group[2])
    shifted = ([s + shift for s in small[0]], group[1], group[2])
    torch.testing.assert_close(advantages(shifted), advantages(small), rtol=0, atol=1e-7)


def test_all_invalid_group_is_zero_and_counted() -> None:
    """No valid rollout, scores NaN: advantages 0, not an uncentred push."""
    nan = torch.full((3,), math.nan)
    result = per_expert_advantages(nan, nan, torch.zeros(3, dtype=torch.bool))
    assert result.all_invalid
    assert result.num_valid == 0
    assert result.mixed_N.tolist() == [0.0, 0.0, 0.0]


def test_towers_mix_linearly_and_penalty_stands_in_each() -> None:
    """mixed = alpha * perception + (1 - alpha) * reasoning, penalty included once."""
    result = per_expert_advantages(
        torch.tensor([1.0, 2.0, math.nan]),
        torch.tensor([0.0, 5.0, math.nan]),
        torch.tensor([True, True, False]),
        alpha=0.25,
    )
    assert result.perception_N is not None
    assert result.reasoning_N is not None
    torch.testing.assert_close(result.mixed_N, 0.25 * result.perception_N + 0.75 * result.reasoning_N)
    # Perception is [1, 2, 0] after substitution: mean 1, std 1.
    torch.testing.assert_close(
        result.perception_N, torch.tensor([0.0, 1.0, -2.5], dtype=torch.float64), rtol=0, atol=1e-5
    )
    assert result.num_valid == 2


def test_perception_alone() -> None:
    """Without reasoning scores the mixed advantage is the perception advantage, not half of it."""
    result = per_expert_advantages(torch.tensor([1.0, 3.0]), None, torch.tensor([True, True]))
    assert result.reasoning_N is None
    torch.testing.assert_close(
        result.mixed_N, torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(2.0), rtol=0, atol=1e-5
    )


def test_zero_variance_and_clipping() -> None:
    """Equal scores give 0; scores beyond the clip become equal and are counted."""
    result = per_expert_advantages(torch.tensor([11.0, 14.0]), torch.tensor([2.0, 2.0]), torch.tensor([True, True]))
    assert result.mixed_N.tolist() == [0.0, 0.0]
    assert result.num_clipped_scores == 2


def test_a_valid_rollout_with_nan_is_refused() -> None:
    """A diverged discriminator stops the run; it is never replaced by a number."""
    with pytest.raises(ValueError, match="not finite"):
        per_expert_advantages(torch.tensor([math.nan, 1.0]), None, torch.tensor([True, True]))
