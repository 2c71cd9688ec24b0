"""The interval is repeatable and has about the coverage that it claims."""

from __future__ import annotations

import numpy as np
import pytest

from prism_megatron.evaluation.bootstrap import mean_interval, statistic_interval


def test_interval_is_close_to_the_normal_one_and_repeatable() -> None:
    """256 values: the bootstrap agrees with mean ± 1.96 standard errors within 8 % of its width."""
    values = np.random.default_rng(0).normal(3.0, 2.0, size=256)
    interval = mean_interval(values, seed=1)
    error = 1.96 * values.std() / np.sqrt(values.size)
    assert interval == mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - error, abs=0.16 * error)
    assert interval.high == pytest.approx(values.mean() + error, abs=0.16 * error)


def test_coverage_of_shares() -> None:
    """True share 0.3 from 100 scenes: inside the interval in 88 to 99 of 100 experiments (binomial, 3 sigma)."""
    experiments = [(np.random.default_rng(i).random(100) < 0.3).astype(np.float64) for i in range(100)]
    inside = sum(low <= 0.3 <= high for _, low, high in (mean_interval(e, seed=i) for i, e in enumerate(experiments)))
    assert 88 <= inside <= 99


def test_one_value_is_an_interval_of_no_width() -> None:
    assert mean_interval([0.25], seed=0) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [1.0, float("inf")], [[1.0]]])
def test_values_without_a_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="an interval needs"):
        mean_interval(values, seed=0)


def test_statistic_interval_of_the_mean_is_that_of_the_mean() -> None:
    """One value a scene: both bootstraps of the mean agree within 5 % of the width (1000 resamples)."""
    values = np.random.default_rng(3).normal(1.0, 2.0, size=200)
    interval = statistic_interval([[value] for value in values], np.mean, seed=1)
    expected = mean_interval(values, seed=1)
    assert interval.mean == pytest.approx(expected.mean)
    width = expected.high - expected.low
    assert interval.low == pytest.approx(expected.low, abs=0.05 * width)
    assert interval.high == pytest.approx(expected.high, abs=0.05 * width)
    assert interval != statistic_interval([[value] for value in values], np.mean, seed=2)


def test_every_scene_is_drawn_and_none_beyond() -> None:
    """Two scenes: means of resamples are 0, a half or 1, the ends in a quarter of them each."""
    assert mean_interval([0.0, 1.0], seed=0) == (0.5, 0.0, 1.0)
    assert statistic_interval([[0.0], [1.0]], np.mean, seed=0) == (0.5, 0.0, 1.0)


def test_scenes_are_resampled_whole() -> None:
    """Eight equal values a scene carry no more than one: the interval stays as wide. Empty scenes count for nothing."""
    values = np.random.default_rng(4).normal(size=50)
    once = statistic_interval([[value] for value in values], np.mean, seed=2)
    eight_times = statistic_interval([*([value] * 8 for value in values), []], np.mean, seed=2)
    assert eight_times == pytest.approx(once)
    with pytest.raises(ValueError, match="at least one value"):
        statistic_interval([[], []], np.mean, seed=0)
