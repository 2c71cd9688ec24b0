"""The paired verdict: against exact arithmetic, and on planted models.

Blind spot: questions that are not independent, such as several about one image; they count as independent.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from prism_megatron.evaluation.benchmark.paired import compare, compare_all, sign_flip_p
from tests.unit.evaluation.benchmark.lines import lines

SIMULATIONS = 200
RIGHT = 0.95
"""19 of 20"""
QUESTIONS = 304
"""as many as MATH-Vision's testmini has"""


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test, which a sign-flip test of differences of 0 and 1 is."""
    n, k = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return float(min(1.0, 2 * tail))


@pytest.mark.parametrize(("gained", "lost"), [(1, 0), (5, 0), (9, 2), (20, 9), (30, 30), (60, 35)])
def test_p_is_that_of_mcnemars_exact_test(gained: int, lost: int) -> None:
    """Tolerance: four standard errors of 9,999 draws, 0.02."""
    differences = [1.0] * gained + [-1.0] * lost + [0.0] * 50
    assert sign_flip_p(differences) == pytest.approx(mcnemar(gained, lost), abs=0.02)


def test_p_of_equal_answers_is_one_and_none_is_zero() -> None:
    assert sign_flip_p([0.0] * 9) == 1.0
    assert sign_flip_p([1.0] * 300) == 1 / 10_000


def answered(generator: np.random.Generator, gain: float) -> tuple[list[float], list[float]]:
    """A model and its base, of the same questions of all difficulties, each drawn independently."""
    easy = generator.beta(1.0, 1.0, size=QUESTIONS)
    base = generator.random(QUESTIONS) < easy
    own = generator.random(QUESTIONS) < np.clip(easy + gain, 0.0, 1.0)
    return own.astype(float).tolist(), base.astype(float).tolist()


@pytest.mark.parametrize(("gain", "verdict"), [(0.2, "better"), (-0.2, "worse"), (0.0, "no difference shown")])
def test_planted_models_get_the_right_verdict(gain: float, verdict: str) -> None:
    """Claim: better, worse and equal models are told as such in at least 19 of 20 simulations.

    Models differ by 0.18 on average, since no question is answered right more than always. The seed is fixed: of equal
    models 0.04 are told apart (measured, 1,000 simulations), which is too near to 1 of 20 for any seed to do.
    """
    generator = np.random.default_rng([20260, round(10 * gain) + 10])
    found = [compare("m", *answered(generator, gain)).verdict for _ in range(SIMULATIONS)]
    assert found.count(verdict) >= RIGHT * SIMULATIONS  # type: ignore[arg-type]  # one of the three


def test_the_figures_beside_the_verdict() -> None:
    one = compare("m", [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0])
    assert (one.own, one.base, one.change.mean) == (0.75, 0.5, 0.25)
    assert (one.gained, one.lost, one.verdict) == (2, 1, "no difference shown")


def test_five_gained_and_none_lost_is_not_enough() -> None:
    """Claim: the interval alone, which leaves out 0 here, decides nothing: chance gives as much once in 16 times."""
    one = compare("m", [1.0] * 5 + [0.0] * 5, [0.0] * 10)
    assert one.change.low > 0.0 and one.p == pytest.approx(1 / 16, abs=0.01)
    assert one.verdict == "no difference shown"
    assert compare("m", [1.0] * 8 + [0.0] * 5, [0.0] * 13).verdict == "better"
    assert compare("m", [0.0] * 13, [1.0] * 8 + [0.0] * 5).verdict == "worse"


def test_questions_are_paired_by_name_and_means_of_other_numbers_of_samples_are_compared() -> None:
    """Claim: whatever the order; pass@k only for the same k."""
    own = lines([[True, True, True, True], [False, False, False, True]])
    base = lines([[False, False], [True, True]])
    turned = [one for name in ("q-1", "q-0") for one in base if one.id == name]
    for theirs in (base, turned):
        found = {one.measure: one for one in compare_all(own, theirs)}
        assert list(found) == ["greedy/accuracy", "sampled/mean", "sampled/pass@2"]
        assert (found["sampled/mean"].own, found["sampled/mean"].base) == (0.625, 0.5)
        assert found["greedy/accuracy"].gained == found["greedy/accuracy"].lost == 1
