"""What is shown of learning from verifiable rewards: the share of right answers, in steps and held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from prism_megatron.evaluation.charts import line_chart
from prism_megatron.evaluation.held_out import GREEDY, SAMPLED, held_out_summary, held_out_table, points_of
from prism_megatron.evaluation.page import figure_of
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.progress import Columns
from prism_megatron.observability.summary import largest, number, pooled, total, window

ACCURACY = "reward/accuracy"


def _cells(row: Row) -> str:
    right, valid, greedy, sampled = (number(row, name) for name in (ACCURACY, "valid_share", GREEDY, SAMPLED))
    norm = number(row, "policy_grad_norm")
    return (
        f"{_figure(right, '.3f'):>6} {_figure(valid, '.2f'):>6} | {_figure(greedy, '.3f'):>7} "
        f"{_figure(sampled, '.3f'):>7} | {_figure(norm, '.3f'):>9}"
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


COLUMNS = Columns(
    groups="    answers   |    held out    |          ",
    heads=" right  valid |  greedy sampled | grad norm",
    cells=_cells,
)


def _summarise(rows: Sequence[Row]) -> Mapping[str, Any]:
    last = window(rows)
    return {
        "policy_version": rows[-1].get("policy_version") if rows else None,
        "accuracy": pooled(last, ACCURACY),
        "valid_share": pooled(last, "valid_share"),
        "rollouts": total(last, "rollouts"),
        **held_out_summary(rows),
        "totals": {
            name: total(rows, name)
            for name in ("rollouts", "response_tokens", "groups", "groups/learned", "groups/batches",
                         "reward/guarded", "reward/killed")
        },
        "largest_grad_norm": {"policy": largest(rows, "policy_grad_norm")},
    }  # fmt: skip


def _tables(summary: Mapping[str, Any]) -> Sequence[str]:
    totals = summary["totals"]
    rows = {
        "Right answers in the last steps": figure_of(summary["accuracy"], ".3f"),
        "In the asked form": figure_of(summary["valid_share"], ".3f"),
        "Best held-out accuracy, sampled": figure_of(summary["best_held_out_accuracy"], ".3f"),
        "Groups learned from, of those asked": f"{totals['groups/learned']:,} of {totals['groups']:,}",
        "Checks that a guard refused": f"{totals['reward/guarded']:,}",
        "Checks that were ended": f"{totals['reward/killed']:,}",
    }
    body = "".join(f"<tr><td>{name}</td><td class='n'>{value}</td></tr>" for name, value in rows.items())
    return [f"<table>{body}</table>", *held_out_table(summary)]


def _charts(rows: Sequence[Row]) -> Sequence[str]:
    points = partial(points_of, rows)

    return [
        line_chart("Right answers", {"rollouts": points(ACCURACY), "held out, greedy": points(GREEDY),
                                     "held out, sampled": points(SAMPLED)}, share=True),
        line_chart("Valid responses", {"rollouts": points("valid_share"), "held out": points("eval/greedy/format")},
                   share=True),
        line_chart("Tokens of an answer", {"held out, greedy": points("eval/greedy/tokens"),
                                           "held out, sampled": points("eval/sampled/tokens")}),
        line_chart("Clipped share of tokens", {"below": points("clip/low_share"), "above": points("clip/high_share")},
                   share=True),
    ]  # fmt: skip


VIEW = StageView(COLUMNS, _summarise, _tables, _charts)
