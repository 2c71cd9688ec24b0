"""Figures of a tower against slow twins and by hand; what has no data has no number."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.evaluation.health import (
    JudgedGroup,
    agreement,
    correlation,
    rank_correlation,
    spread,
    tower_figures,
)

value = st.integers(-4, 4).map(float)
lists = st.integers(2, 8).flatmap(
    lambda n: st.tuples(st.lists(value, min_size=n, max_size=n), st.lists(value, min_size=n, max_size=n))
)


def test_figures_of_two_groups_by_hand() -> None:
    """A win, a tie and a loss in one group, a win in the other; only the first can be ordered and correlated."""
    groups = [
        JudgedGroup(2.0, [1.0, 2.0, 3.0], [30, 20, 10], [False, False, True]),
        JudgedGroup(4.0, [0.0], [7], [True]),
    ]
    figures = tower_figures(groups)
    assert figures["pairs"] == 4
    assert figures["accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert figures["reward_gap"] == (1 + 0 - 1 + 4) / 4
    assert (figures["reference_count"], figures["reference_score"]) == (2, 3.0)
    assert figures["reference_std"] == pytest.approx(math.sqrt(2.0))
    assert figures["rollout_score"] == 1.5
    assert figures["rollout_std"] == pytest.approx(statistics.stdev([1, 2, 3, 0]))
    assert (figures["auc"], figures["auc_pairs"]) == (1.0, 2)
    assert figures["length_correlation"] == pytest.approx(-1.0)
    assert figures["length_correlation_count"] == 3


@pytest.mark.parametrize("groups", [[], [JudgedGroup(1.0, [], [])]])
def test_without_pairs_there_is_no_figure(groups: list[JudgedGroup]) -> None:
    """Claim: None beside a count of 0, never a number, also where a reference was scored alone."""
    figures = tower_figures(groups)
    for name in ("accuracy", "reward_gap", "rollout_score", "rollout_std", "reference_std", "auc"):
        assert figures[name] is None
    for count in ("pairs", "auc_pairs", "length_correlation_count"):
        assert figures[count] == 0
    assert (figures["reference_score"] is None) == (not groups)
    assert figures["length_correlation"] is None


@pytest.mark.parametrize("bad", [[math.inf, -math.inf], [math.nan, 1.0], [math.inf, math.inf]])
def test_figures_of_a_diverged_discriminator_are_no_numbers_and_no_error(bad: list[float]) -> None:
    """Claim: what is not finite is seen in the figures, so that the game can go back, and not end in an error."""
    figures = tower_figures([JudgedGroup(1.0, bad, [3, 4], [True, False]), JudgedGroup(bad[1], [0.0], [5])])
    for name in ("reward_gap", "rollout_score", "rollout_std"):
        value = figures[name]
        assert value is not None
        assert not math.isfinite(value)
    assert figures["pairs"] == 3
    agreement([bad], [[1.0, 2.0]])


def test_unknown_truth_counts_no_pair() -> None:
    """Groups whose truth nobody knows are left out of the AUC and of nothing else."""
    figures = tower_figures([JudgedGroup(1.0, [0.0, 2.0], [1, 2])])
    assert (figures["auc"], figures["auc_pairs"], figures["pairs"]) == (None, 0, 2)


@settings(deadline=None, max_examples=60)
@given(lists)
def test_correlations_equal_numpys(pair: tuple[list[float], list[float]]) -> None:
    """Pearson and Spearman (ranks of a slow twin) to 1e-9; None exactly where a side does not vary."""
    xs, ys = pair
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        assert correlation(xs, ys) is rank_correlation(xs, ys) is None
        return
    ranks = [[sum(b < a for b in side) + (side.count(a) - 1) / 2 for a in side] for side in (xs, ys)]
    assert correlation(xs, ys) == pytest.approx(np.corrcoef(xs, ys)[0, 1], abs=1e-9)
    assert rank_correlation(xs, ys) == pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1], abs=1e-9)
    assert spread(xs) == pytest.approx(statistics.stdev(xs))


def test_a_groups_level_is_no_correlation_with_length() -> None:
    """Long answers to one prompt and short ones to another, scored apart: inside the groups length explains nothing."""
    groups = [JudgedGroup(0.0, [5.0, 5.0], [100, 120]), JudgedGroup(0.0, [1.0, 1.0], [10, 12])]
    assert tower_figures(groups)["length_correlation"] is None


def test_length_explains_what_it_explains_inside_the_groups() -> None:
    """Longer is better in both groups, whatever their own lengths: a correlation of 1."""
    groups = [JudgedGroup(0.0, [1.0, 2.0], [10, 11]), JudgedGroup(0.0, [5.0, 6.0], [100, 101])]
    assert tower_figures(groups)["length_correlation"] == pytest.approx(1.0)


def test_equal_values_do_not_vary_however_their_mean_is_rounded() -> None:
    """The mean of three times 0.003 is not 0.003 in float64, and what is left over is no variation."""
    assert statistics.fmean([0.003] * 3) != 0.003, "blind: these must round"
    assert correlation([0.003] * 3, [1.0, 2.0, 3.0]) is None
    assert spread([0.003] * 3) == 0.0


def test_agreement_is_a_mean_over_groups_that_have_one() -> None:
    """One group agrees, one disagrees, one has equal scores: 0 over 2 groups."""
    perception = [[1.0, 2.0], [1.0, 2.0], [3.0, 3.0]]
    reasoning = [[5.0, 9.0], [9.0, 5.0], [1.0, 2.0]]
    assert agreement(perception, reasoning) == {"tower_agreement": 0.0, "tower_agreement_groups": 2}
    assert agreement([], []) == {"tower_agreement": None, "tower_agreement_groups": 0}
