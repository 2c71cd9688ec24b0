"""Figures of held-out prompts over a run: a row's words, what moved, the summary, the report."""

from __future__ import annotations

import pytest

from prism_megatron.evaluation.held_out import (
    held_out_charts,
    held_out_summary,
    held_out_table,
    line_of,
    lines_of,
    means,
    moved,
)
from prism_megatron.observability.metrics import Row

BEFORE = {"greedy/accuracy": [1.0, 0.0], "sampled/accuracy": [0.25, 0.0], "sampled/format": [1.0, 0.5]}


def test_means_are_over_prompts_and_said_in_words() -> None:
    row = means(BEFORE)
    assert row == {"eval/prompts": 2, "eval/greedy/accuracy": 0.5, "eval/sampled/accuracy": 0.125,
                   "eval/sampled/format": 0.75}  # fmt: skip
    assert line_of(row, step=9) == (
        "2 held-out prompts after step 10: right 0.500 greedily and 0.125 of samples, 0.750 of these in the asked form"
    )


def test_changes_are_paired() -> None:
    """Claim: both prompts rose by a quarter, so that the change has no spread although the levels have."""
    after = {name: [value + 0.25 for value in values] for name, values in BEFORE.items()}
    found = moved(BEFORE, after)
    own = found["greedy/accuracy"]
    assert own["change"] == pytest.approx((0.25, 0.25, 0.25))
    assert (own["before"].mean, own["after"].mean) == (0.5, 0.75)
    assert own["before"].low < own["before"].mean < own["before"].high
    (line,) = [line for line in lines_of(found) if line.startswith("greedy/accuracy")]
    assert line.split() == ["greedy/accuracy", "0.500", "[0.000,", "1.000]", "0.750", "+0.250", "[+0.250,", "+0.250]"]


def test_the_best_step_is_that_with_most_samples_right() -> None:
    rows: list[Row] = [{"step": 0}] + [
        {"step": step, "eval/sampled/accuracy": value, "eval/greedy/accuracy": 1 - value}
        for step, value in ((1, 0.2), (3, 0.7), (5, 0.6))
    ]
    assert held_out_summary(rows) == {"best_held_out_accuracy": 0.7, "best_held_out_step": 3.0}
    assert held_out_summary(rows[:1]) == {"best_held_out_accuracy": None, "best_held_out_step": None}


def test_the_report_has_a_table_and_curves_where_any_was_asked() -> None:
    """Claim: nothing of a run that asked nobody; three charts, and a table with every measure, of one that did."""
    assert held_out_table({}) == [] and not any(held_out_charts([{"step": 0}]))
    (table,) = held_out_table({"held_out": {name: {**own} for name, own in moved(BEFORE, BEFORE).items()}})
    assert table.count("<tr>") == 1 + len(BEFORE) and "0.125 [0.000, 0.250]" in table
    rows: list[Row] = [
        {"step": 0},
        {"step": 1, "eval/greedy/accuracy": 0.5, "eval/sampled/format": 0.5, "eval/greedy/tokens": 9},
    ]
    assert [chart.count("<figcaption>Held-out prompts") for chart in held_out_charts(rows)] == [1, 1, 1]
