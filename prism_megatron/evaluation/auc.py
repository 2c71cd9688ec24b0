"""Within-group AUC: does a right rollout score above a wrong one of the same prompt?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AUC:
    """``value`` is None where no group holds both a right and a wrong rollout; ``pairs`` counts the comparisons."""

    value: float | None
    pairs: int


def within_group_auc(groups: Iterable[Sequence[tuple[float, bool]]]) -> AUC:
    """Share of (right, wrong) pairs of one group that the scores order correctly; a tie counts one half.

    Each group lists ``(score, is_right)``. Pairs are pooled over groups (Mann-Whitney U over its maximum).
    """
    won, pairs = 0.0, 0
    for group in groups:
        right = [score for score, is_right in group if is_right]
        wrong = [score for score, is_right in group if not is_right]
        won += sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
        pairs += len(right) * len(wrong)
    return AUC(value=won / pairs if pairs else None, pairs=pairs)
