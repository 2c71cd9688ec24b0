"""What is shown of supervised fine-tuning: the loss of the steps, and that of the held-out part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism_megatron.evaluation.charts import line_chart
from prism_megatron.evaluation.page import figure_of, text_of
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.progress import Columns
from prism_megatron.observability.summary import number, total, window

HELD_OUT = "held_out/loss"


def _cells(row: Row) -> str:
    loss, held_out, norm = (number(row, name) for name in ("loss", HELD_OUT, "policy_grad_norm"))
    return f"{_figure(loss, '.4f'):>8} {_figure(held_out, '.4f'):>8} | {_figure(norm, '.3f'):>9}"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


COLUMNS = Columns(groups="      loss       |          ", heads="    step held out | grad norm", cells=_cells)


def _summarise(rows: Sequence[Row]) -> Mapping[str, Any]:
    recent = window(rows)
    tokens = total(recent, "label_tokens")
    weighed = sum((number(row, "loss") or 0.0) * (number(row, "label_tokens") or 0.0) for row in recent)
    asked = [row for row in rows if number(row, HELD_OUT) is not None]
    best = min(asked, key=lambda row: number(row, HELD_OUT) or 0.0, default=None)
    last = {} if not asked else {name: value for name, value in asked[-1].items() if name.startswith("held_out/")}
    return {
        "loss": weighed / tokens if tokens else None,
        "label_tokens": total(rows, "label_tokens"),
        "tokens": total(rows, "tokens"),
        "samples": total(rows, "samples"),
        "skipped_samples": total(rows, "skipped_samples"),
        "held_out": last,
        "best_held_out_loss": None if best is None else number(best, HELD_OUT),
        "best_held_out_step": None if best is None else number(best, "step"),
    }


def _tables(summary: Mapping[str, Any]) -> Sequence[str]:
    rows = {
        "Loss of the last steps": figure_of(summary["loss"], ".4f"),
        "Best held-out loss": figure_of(summary["best_held_out_loss"], ".4f"),
        "Samples": f"{summary['samples']:,.0f}",
        "Label tokens": f"{summary['label_tokens']:,.0f}",
    }
    for name, value in summary["held_out"].items():
        if name.endswith("/loss") and name != HELD_OUT:
            rows[f"Held out: {text_of(name.split('/', 1)[1].removesuffix('/loss'))}"] = figure_of(value, ".4f")
    body = "".join(f"<tr><td>{name}</td><td class='n'>{value}</td></tr>" for name, value in rows.items())
    return [f"<table>{body}</table>", *_drift_table(summary)]


def _drift_table(summary: Mapping[str, Any]) -> list[str]:
    rows = "".join(
        f"<tr><td>{text_of(mode)}: {text_of(measure)}</td><td class='n'>{figure_of(found['before'][0], '.3f')}</td>"
        f"<td class='n'>{figure_of(found['after'][0], '.3f')}</td>"
        f"<td class='n'>{figure_of(found['change'][0], '+.3f')} [{figure_of(found['change'][1], '+.3f')}, "
        f"{figure_of(found['change'][2], '+.3f')}]</td></tr>"
        for mode, measures in summary.get("drift", {}).items()
        for measure, found in measures.items()
    )
    head = "<tr><th>Held-out scenes</th><th class='n'>before</th><th class='n'>after</th><th class='n'>change</th></tr>"
    return [f"<table>{head}{rows}</table>"] if rows else []


def _charts(rows: Sequence[Row]) -> Sequence[str]:
    def points(name: str) -> list[tuple[float, float | None]]:
        return [(number(row, "step") or 0.0, number(row, name)) for row in rows if name in row]

    return [line_chart("Loss a label token", {"step": points("loss"), "held out": points(HELD_OUT)})]


VIEW = StageView(COLUMNS, _summarise, _tables, _charts)
