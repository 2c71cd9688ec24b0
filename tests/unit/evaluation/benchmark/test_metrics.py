"""Figures of an evaluation, held against all ways of choosing samples and answers.

Blind spot: whether an answer is right (``tests/unit/rewards``).
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from prism_megatron.evaluation.benchmark.answers import Item
from prism_megatron.evaluation.benchmark.metrics import (
    figures_of,
    groups_of,
    ks_of,
    majority,
    pass_at_k,
    summary_of,
)
from tests.unit.evaluation.benchmark.lines import line, lines

ROUNDING = 1e-12


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n: int) -> None:
    """Claim: equal to counting all ways to choose k of n samples, exactly (oracle: enumeration)."""
    for right in range(n + 1):
        samples = [i < right for i in range(n)]
        for k in range(1, n + 1):
            choices = list(itertools.combinations(samples, k))
            share = Fraction(sum(map(any, choices)), len(choices))
            assert pass_at_k(n, right, k) == pytest.approx(float(share), abs=ROUNDING)


def test_pass_at_k_needs_k_samples() -> None:
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"pass@{k} needs {k} samples, and there are 4"):
            pass_at_k(4, 2, k)


def test_a_majority_is_of_texts_and_ties_are_drawn() -> None:
    """Claim: the expected rightness of the answer that most samples give; an empty answer has no vote."""
    assert majority([("3", True), ("3", True), ("4", False)]) == 1.0
    assert majority([("3", True), ("4", False), ("4", False)]) == 0.0
    assert majority([("3", True), ("4", False)]) == 0.5
    assert majority([("3", True), ("4", False), ("5", False), ("", False), ("", False)]) == pytest.approx(1 / 3)
    assert majority([("", False), ("", False)]) == 0.0
    # The same text in another form does not count: what is drawn is one of the answers.
    assert majority([("3", True), ("3", False), ("4", False)]) == 0.5


def test_the_measures_of_one_question() -> None:
    own = [line(right=False, tokens=4), *(line(mode="sampled", sample=i, right=i < 3, tokens=10 + i) for i in range(4))]
    own[4] = line(mode="sampled", sample=3, right=True, valid=False, answer="3", tokens=13)
    found = figures_of(own)
    assert found["greedy/accuracy"] == 0.0 and found["greedy/tokens"] == 4.0
    assert found["sampled/mean@4"] == 0.75, "right in another form is not counted"
    assert found["sampled/right in any form"] == 1.0 and found["sampled/in the asked form"] == 0.75
    assert found["sampled/pass@2"] == 1.0 and found["sampled/pass@4"] == 1.0
    assert found["sampled/maj@4"] == 0.75
    assert found["sampled/tokens"] == 11.5 and found["sampled/failures"] == 0.0


def test_a_failure_is_wrong_and_counted() -> None:
    """Claim: it lowers accuracy and raises failures; its length, which it has not, is in no mean."""
    found = figures_of([line(failure="HTTP 400"), line(mode="sampled"), line(mode="sampled", sample=1, failure="x")])
    assert found["greedy/accuracy"] == 0.0 and found["greedy/failures"] == 1.0 and found["greedy/tokens"] is None
    assert found["sampled/mean@2"] == 0.5 and found["sampled/failures"] == 0.5 and found["sampled/tokens"] == 10.0


def test_which_k_are_told() -> None:
    assert [ks_of(n) for n in (0, 1, 2, 4, 6, 8)] == [[], [], [2], [2, 4], [2, 4, 6], [2, 4, 8]]


def item(number: int, of: str, kind: str, difficulty: str | None = None, source: str | None = None) -> Item:
    return Item(of, f"q-{number}", "d", kind, source or of, difficulty)


def test_groups_are_those_that_tell_questions_apart() -> None:
    """Claim: one value is no group, and sources that are the sets are not told twice."""
    items = [item(0, "a", "choice", "1"), item(1, "a", "integer", "2"), item(2, "b", "integer")]
    found = {(group.by, group.name): list(group.members) for group in groups_of(items)}
    assert found == {
        ("set", "a"): [0, 1],
        ("set", "b"): [2],
        ("kind", "choice"): [0],
        ("kind", "integer"): [1, 2],
        ("difficulty", "1"): [0],
        ("difficulty", "2"): [1],
        ("difficulty", "not said"): [2],
    }
    assert groups_of([item(0, "a", "choice"), item(1, "a", "choice")]) == []


def test_the_summary_has_all_questions_and_every_group() -> None:
    answers = lines([[True, True], [False, True], [False, False]])
    items = [item(0, "made", "choice"), item(1, "made", "integer"), item(2, "made", "integer")]
    summary = summary_of(items, [answers[:3], answers[3:6], answers[6:]])
    assert (summary["questions"], summary["answers"], summary["failures"]) == (3, 9, 0)
    assert summary["figures"]["greedy/accuracy"]["mean"] == pytest.approx(1 / 3)
    assert summary["figures"]["sampled/mean@2"]["mean"] == pytest.approx(0.5)
    low, high = (summary["figures"]["sampled/mean@2"][end] for end in ("low", "high"))
    assert low < 0.5 < high
    integer = next(group for group in summary["groups"] if group["name"] == "integer")
    assert integer["questions"] == 2 and integer["figures"]["sampled/pass@2"]["mean"] == 0.5
    assert "greedy/tokens" not in integer["figures"]
