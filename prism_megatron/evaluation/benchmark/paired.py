"""Is one evaluation better than another? Question by question, with an interval, a test and a rule that is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from prism_megatron.evaluation.benchmark.answers import Answered, by_item
from prism_megatron.evaluation.benchmark.metrics import figures_of, heads_of
from prism_megatron.evaluation.bootstrap import Interval, mean_interval

RULE = (
    "better or worse where the 95 % interval of the paired differences (bootstrap over questions, 4,000 draws) leaves "
    "out 0 and their sign-flip test (two-sided, 9,999 draws) gives p of at most 0.05; else no difference shown"
)
Outcome = Literal["better", "worse", "no difference shown"]
_LEVEL = 0.05
_FLIPS = 9999
_AT_ONCE = 333


@dataclass(frozen=True)
class Paired:
    """One measure of two evaluations of the same questions."""

    measure: str
    base: float
    own: float
    change: Interval
    p: float
    gained: int
    """questions with a greater figure than the other's"""
    lost: int
    verdict: Outcome

    def to_plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "change": self.change._asdict()}


def sign_flip_p(differences: Sequence[float]) -> float:
    """How often chance gives a sum at least as far from 0, if either of a pair were as likely to be the other's.

    Signs of the differences are drawn anew; (1 + hits) / (1 + draws), which is never 0: Phipson and Smyth 2010,
    "Permutation P-values should never be zero". Of differences that are all 0 it is 1.
    """
    moved = np.asarray([value for value in differences if value != 0.0], dtype=np.float64)
    if moved.size == 0:
        return 1.0
    generator = np.random.default_rng(0)
    seen = abs(float(moved.sum())) - 1e-9
    hits = 0
    for _ in range(_FLIPS // _AT_ONCE):
        signs = 2.0 * generator.integers(0, 2, size=(_AT_ONCE, moved.size)) - 1.0
        hits += int((np.abs(signs @ moved) >= seen).sum())
    return (1 + hits) / (1 + _FLIPS)


def compare(measure: str, own: Sequence[float], base: Sequence[float]) -> Paired:
    """Of the same questions in the same order. Raises ValueError for another number, and for none."""
    differences = [new - old for new, old in zip(own, base, strict=True)]
    change, p = mean_interval(differences, seed=0), sign_flip_p(differences)
    verdict: Outcome = "no difference shown"
    if p <= _LEVEL and change.low > 0.0:
        verdict = "better"
    elif p <= _LEVEL and change.high < 0.0:
        verdict = "worse"
    return Paired(
        measure,
        base=sum(base) / len(base),
        own=sum(own) / len(own),
        change=change,
        p=p,
        gained=sum(value > 0 for value in differences),
        lost=sum(value < 0 for value in differences),
        verdict=verdict,
    )


def compare_all(own: Sequence[Answered], base: Sequence[Answered]) -> list[Paired]:
    """The measures of right answers that both have. Questions are paired by set and id.

    mean@k of other numbers of samples are one measure; pass@k and maj@k are compared for the same k alone.
    """
    theirs = {key: _measures(answers) for key, answers in by_item(base).items()}
    ours = {key: _measures(answers) for key, answers in by_item(own).items()}
    shared = [name for name in next(iter(ours.values())) if name in next(iter(theirs.values()))]
    return [compare(name, [ours[key][name] for key in ours], [theirs[key][name] for key in ours]) for name in shared]


def _measures(answers: Sequence[Answered]) -> dict[str, float]:
    figures = figures_of(answers)
    found = {}
    for name in heads_of(list(figures)):
        value = figures[name]
        assert value is not None, "shares of right answers have data always"
        found["sampled/mean" if name.startswith("sampled/mean@") else name] = value
    return found
