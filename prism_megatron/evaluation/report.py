"""``report.html``: one page about one run of any stage: curves, figures and sample answers with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from prism_megatron.evaluation.charts import has_data, line_chart
from prism_megatron.evaluation.page import figure_of, text_of, write_page
from prism_megatron.evaluation.sample import Sample
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.progress import format_seconds
from prism_megatron.observability.summary import number, step_seconds


def write_report(
    path: Path,
    *,
    title: str,
    view: StageView,
    rows: Sequence[Row],
    summary: Mapping[str, Any],
    samples: Sequence[Sample],
) -> None:
    """Write the page in one rename. ``rows`` are those of ``metrics.jsonl``, ``summary`` that of ``summary.json``."""
    charts = "".join((*view.charts(rows), *_charts_of_all_stages(rows)))
    body = f"<section class='tables'>{''.join(view.tables(summary))}{_time_table(summary)}</section>"
    if charts:
        body += f"<h2>Curves</h2><section class='charts'>{charts}</section>"
    if samples:
        body += f"<h2>Sample rollouts</h2>{''.join(_article(sample) for sample in samples)}"
    write_page(path, title=title, lead=_lead(summary), body=f"{body}<h2>Files</h2>{_files_table(summary)}")


def _lead(summary: Mapping[str, Any]) -> str:
    layout = " · ".join(f"{axis.upper()}{size}" for axis, size in summary["layout"].items()) or "unknown layout"
    return (
        f"{summary['steps']} steps on {summary['world_size'] or 'unknown'} ranks ({layout}), megatron-core "
        f"{summary['megatron_core'] or 'unknown'}, torch {summary['torch'] or 'unknown'}. Figures are means over the "
        f"last {summary['window_steps']} steps unless a step is named."
    )


def _time_table(summary: Mapping[str, Any]) -> str:
    body = "".join(
        f"<tr><td>{text_of(phase.replace('_', ' '))}</td><td class='n'>{format_seconds(seconds)}</td></tr>"
        for phase, seconds in summary["seconds_by_phase"].items()
    )
    speed = figure_of(summary["tokens_per_second"], ",.0f")
    body += f"<tr><td>Response tokens a second</td><td class='n'>{speed}</td></tr>"
    return f"<table><tr><th>Phase</th><th class='n'>Time</th></tr>{body}</table>"


def _files_table(summary: Mapping[str, Any]) -> str:
    files = ((str(summary.get("exported") or "Export"), "hf_export"), ("Checkpoint", "checkpoint"))
    body = "".join(
        f"<tr><td>{text_of(name)}</td><td>{text_of(str(summary[key] or '–'))}</td></tr>" for name, key in files
    )
    return f"<table>{body}</table>"


def _charts_of_all_stages(rows: Sequence[Row]) -> list[str]:
    steps = [number(row, "step") or 0.0 for row in rows]
    seconds = [(step, step_seconds(row)) for step, row in zip(steps, rows, strict=True)]
    memory = {
        where: [(step, number(row, f"memory/{where}_gib")) for step, row in zip(steps, rows, strict=True)]
        for where in ("host", "gpu")
    }
    return [
        line_chart("Seconds a step", {"seconds": seconds}),
        line_chart(
            "Memory of the rank that holds most, GiB", {name: own for name, own in memory.items() if has_data(own)}
        ),
    ]


def _article(sample: Sample) -> str:
    images = "".join(f"<img alt='image of the prompt' src='{escape(url, quote=True)}'>" for url in sample.images)
    verdict = "valid" if sample.problem is None else f"not valid: {sample.problem}"
    return (
        f"<article><div><div class='images'>{images}</div><div class='texts'>"
        f"<div class='wide'><h3>Prompt</h3><pre>{text_of(sample.prompt)}</pre></div>"
        f"<div><h3>Rollout ({text_of(verdict)})</h3>{_scores(sample.scores)}<pre>{text_of(sample.response)}</pre></div>"
        f"<div><h3>Reference</h3>{_scores(sample.reference_scores)}<pre>{text_of(sample.reference)}</pre></div>"
        "</div></div></article>"
    )


def _scores(scores: Mapping[str, float | None]) -> str:
    if not scores:
        return ""
    figures = ", ".join(f"{text_of(tower)} {figure_of(score, '+.2f')}" for tower, score in scores.items())
    return f"<p class='scores'>scores: {figures}</p>"
