"""Curves of the game between policy and discriminator, tower by tower, and of what both of them do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism_megatron.evaluation.charts import Points, line_chart
from prism_megatron.observability.catalogue import ROLES
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.summary import number
from prism_megatron.types import TOWER_NAMES

Curve = Callable[[str], Points]
SIDES = ("reference", "rollout")


def game_charts(rows: Sequence[Row]) -> list[str]:
    """One figure for each question about the towers; a curve has gaps where there is no data."""

    def curve(key: str) -> Points:
        return [(number(row, "step") or 0.0, number(row, key)) for row in rows]

    def probed(key: str) -> Points:
        return [(x, y) for x, y in curve(key) if y is not None]

    def both(key: str, of: Curve = curve) -> dict[str, Points]:
        return {tower: of(key.format(tower=tower)) for tower in TOWER_NAMES}

    def sides(key: str) -> dict[str, Points]:
        return {f"{tower}, {side}": curve(f"{tower}/{side}_{key}") for tower in TOWER_NAMES for side in SIDES}

    return [
        line_chart("Reward gap: score of reference less score of rollout", both("{tower}/reward_gap")),
        line_chart("Discriminator accuracy: pairs it ranks right", both("{tower}/accuracy"), share=True),
        line_chart("Right rollouts scored above wrong ones (AUC)", both("{tower}/auc"), share=True),
        line_chart("Mean score", sides("score")),
        line_chart("Spread of scores: standard deviation", sides("std")),
        line_chart("Correlation of score with length, within groups", both("{tower}/length_correlation")),
        line_chart("Do the towers rank a group's rollouts alike?", {"rank correlation": curve("tower_agreement")}),
        line_chart("Evenness of the experts' load: entropy, 1 is even", both("{tower}/expert_entropy"), share=True),
        line_chart("Probe set: reward gap", both("probe/{tower}/reward_gap", probed)),
        line_chart("Probe set: accuracy", both("probe/{tower}/accuracy", probed), share=True),
    ]


def answer_charts(rows: Sequence[Row]) -> list[str]:
    """What the answers are like, and the size of the updates that they lead to."""

    def curve(key: str) -> Points:
        return [(number(row, "step") or 0.0, number(row, key)) for row in rows]

    truths = {
        "caption items": curve("truth/item_accuracy"),
        "reasoning steps": curve("truth/step_validity"),
        "answer": curve("truth/answer_right"),
    }
    return [
        line_chart("Valid rollouts", {"valid": curve("valid_share")}, share=True),
        line_chart("Tokens in a response", {"tokens": _ratio(rows, "response_tokens", "rollouts")}),
        line_chart("Right against the known truth of the scenes", truths, share=True),
        line_chart("Gradient norm", {role: curve(f"{role}_grad_norm") for role in ROLES}),
    ]


def _ratio(rows: Sequence[Row], key: str, count_key: str) -> Points:
    points: list[tuple[float, float | None]] = []
    for row in rows:
        value, count = number(row, key), number(row, count_key)
        points.append((number(row, "step") or 0.0, value / count if value is not None and count else None))
    return points
