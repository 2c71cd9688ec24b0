"""Figures of held-out prompts that a policy answers while it learns: in a row, over a run, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism_megatron.evaluation.bootstrap import Interval, mean_interval
from prism_megatron.evaluation.charts import Points, line_chart
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.page import figure_of, text_of
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.summary import number

Values = Mapping[str, Sequence[float]]
"""By measure, one value of each prompt."""
Moved = Mapping[str, Mapping[str, Interval]]
"""By measure: ``before``, ``after`` and ``change``."""
GREEDY, SAMPLED = "eval/greedy/accuracy", "eval/sampled/accuracy"
_WHEN = ("before", "after", "change")


def means(values: Values) -> Figures:
    """The means over prompts, as entries of a step's row."""
    prompts = len(next(iter(values.values())))
    return {
        "eval/prompts": prompts,
        **{f"eval/{name}": sum(of_prompts) / prompts for name, of_prompts in values.items()},
    }


def line_of(row: Figures, *, step: int) -> str:
    """A step's :func:`means` in words."""
    greedy, sampled, form = (row[name] for name in (GREEDY, SAMPLED, "eval/sampled/format"))
    return (
        f"{row['eval/prompts']} held-out prompts after step {step + 1}: right {greedy:.3f} greedily and {sampled:.3f} "
        f"of samples, {form:.3f} of these in the asked form"
    )


def moved(before: Values, after: Values) -> Moved:
    """How answers to the same prompts changed: means with 95 % intervals over prompts, the change paired by prompt."""
    return {
        name: {
            "before": _interval(before[name]),
            "after": _interval(values),
            "change": _interval([new - old for new, old in zip(values, before[name], strict=True)]),
        }
        for name, values in after.items()
    }


def _interval(values: Sequence[float]) -> Interval:
    return mean_interval(values, seed=0)


def lines_of(found: Moved) -> list[str]:
    """What :func:`moved` found as a table of text."""
    lines = [f"{'held-out prompts':<20} {'before':>25} {'after':>8}   change"]
    for name, own in found.items():
        form = ".1f" if name.endswith("/tokens") else ".3f"
        (start, low, high), (end, *_), (change, least, most) = (own[when] for when in _WHEN)
        before = f"{start:{form}} [{low:{form}}, {high:{form}}]"
        lines.append(f"{name:<20} {before:>25} {end:>8{form}}   {change:+{form}} [{least:+{form}}, {most:+{form}}]")
    return lines


def held_out_summary(rows: Sequence[Row]) -> dict[str, float | None]:
    """The highest accuracy of samples that a step had, and which step."""
    asked = [row for row in rows if number(row, SAMPLED) is not None]
    best = max(asked, key=lambda row: number(row, SAMPLED) or 0.0, default=None)
    return {
        "best_held_out_accuracy": None if best is None else number(best, SAMPLED),
        "best_held_out_step": None if best is None else number(best, "step"),
    }


def held_out_table(summary: Mapping[str, Any]) -> list[str]:
    """HTML of what :func:`moved` found, where a summary has it; nothing else."""
    rows = "".join(
        f"<tr><td>{text_of(name)}</td>{''.join(f'<td class=n>{_cell(own[when])}</td>' for when in _WHEN)}</tr>"
        for name, own in summary.get("held_out", {}).items()
    )
    heads = "".join(f"<th class='n'>{when}</th>" for when in _WHEN)
    return [f"<table><tr><th>Held-out prompts</th>{heads}</tr>{rows}</table>"] if rows else []


def _cell(found: Sequence[float]) -> str:
    mean, low, high = (figure_of(value, ".3f") for value in found)
    return f"{mean} [{low}, {high}]"


def points_of(rows: Sequence[Row], name: str) -> Points:
    """A curve through the steps that have the figure."""
    return [(number(row, "step") or 0.0, number(row, name)) for row in rows if name in row]


def held_out_charts(rows: Sequence[Row]) -> list[str]:
    """Right answers, their form and their length; empty where no step was asked."""

    def curves(measure: str) -> dict[str, Points]:
        return {mode: points_of(rows, f"eval/{mode}/{measure}") for mode in ("greedy", "sampled")}

    return [
        line_chart("Held-out prompts: right answers", curves("accuracy"), share=True),
        line_chart("Held-out prompts: valid responses", curves("format"), share=True),
        line_chart("Held-out prompts: tokens of an answer", curves("tokens")),
    ]
