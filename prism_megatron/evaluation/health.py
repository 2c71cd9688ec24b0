"""How the game between policy and discriminator stands: figures of one tower over the groups of a step.

Every figure has its count beside it; one without data is None. Scores are those before the clip.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prism_megatron.evaluation.auc import within_group_auc

Figures = dict[str, float | int | None]


@dataclass(frozen=True)
class JudgedGroup:
    """What one tower gave one group: the reference's score, and one entry for each valid rollout.

    ``lengths`` are tokens of the judged segment; ``right`` says which of them are known to be right, or is None where
    nobody knows.
    """

    reference: float
    rollouts: Sequence[float]
    lengths: Sequence[int]
    right: Sequence[bool] | None = None


def tower_figures(groups: Sequence[JudgedGroup]) -> Figures:
    """Accuracy (a tie is one half), reward gap, mean and spread of both sides, AUC, and what length explains.

    ``pairs`` counts for all that concerns rollouts; ``*_std`` are unbiased, over all scores of the side;
    ``length_correlation`` is Pearson's over rollouts of groups with at least two, each group centred, because only
    differences inside a group reach the policy.
    """
    margins = [group.reference - score for group in groups for score in group.rollouts]
    references = [group.reference for group in groups]
    rollouts = [score for group in groups for score in group.rollouts]
    auc = within_group_auc(
        list(zip(group.rollouts, group.right, strict=True)) for group in groups if group.right is not None
    )
    several = [group for group in groups if len(group.rollouts) > 1]
    return {
        "pairs": len(margins),
        "accuracy": mean((margin > 0) + 0.5 * (margin == 0) for margin in margins),
        "reward_gap": mean(margins),
        "reference_count": len(references),
        "reference_score": mean(references),
        "reference_std": spread(references),
        "rollout_score": mean(rollouts),
        "rollout_std": spread(rollouts),
        "auc": auc.value,
        "auc_pairs": auc.pairs,
        "length_correlation": correlation(
            [value for group in several for value in centred(group.rollouts)],
            [value for group in several for value in centred(group.lengths)],
        ),
        "length_correlation_count": sum(len(group.rollouts) for group in several),
    }


def agreement(perception: Sequence[Sequence[float]], reasoning: Sequence[Sequence[float]]) -> Figures:
    """Do both towers rank the rollouts of a group alike? Spearman's correlation, averaged over groups that have one."""
    known = [
        value
        for one, other in zip(perception, reasoning, strict=True)
        if (value := rank_correlation(one, other)) is not None
    ]
    return {"tower_agreement": mean(known), "tower_agreement_groups": len(known)}


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Spearman's rho, ties sharing their mean rank; None where one side has no two different values."""
    return correlation(_ranks(xs), _ranks(ys))


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's r; None for fewer than two points, or where one side does not vary."""
    pairs = list(zip(centred(xs), centred(ys), strict=True))
    of_xs, of_ys = sum(x * x for x, _ in pairs), sum(y * y for _, y in pairs)
    if len(pairs) < 2 or not of_xs * of_ys:
        return None
    return sum(x * y for x, y in pairs) / math.sqrt(of_xs * of_ys)


def centred(values: Sequence[float]) -> list[float]:
    """Differences to the mean; exactly 0 where all values are equal, which rounding of the mean would hide."""
    if len(set(values)) < 2:
        return [0.0] * len(values)
    middle = _mean(values)
    return [value - middle for value in values]


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    known = list(values)
    return _mean(known) if known else None


def spread(values: Sequence[float]) -> float | None:
    """The unbiased standard deviation, or None of fewer than two values."""
    return math.sqrt(sum(value**2 for value in centred(values)) / (len(values) - 1)) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float:
    """Scores that are not finite have a mean that is not either; ``fmean`` raises for infinities of both signs."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]
