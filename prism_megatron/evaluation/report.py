"""``report.html``: one page about one run that stands alone: curves, figures and sample rollouts with their images.

What the model wrote is hostile text. It is escaped, stripped of control and direction-changing characters, and the page
forbids scripts and every outside resource in its content security policy.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from prism_megatron.evaluation.charts import line_chart
from prism_megatron.evaluation.game_charts import game_charts
from prism_megatron.observability.metrics import Row, write_atomically
from prism_megatron.observability.progress import format_seconds
from prism_megatron.observability.summary import number, step_seconds
from prism_megatron.types import TOWER_NAMES

_MAX_IMAGE_SIDE = 320
_MAX_CHARACTERS = 6000
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; color: #1a1a1a;
       background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p.lead { margin: 0 0 1rem; color: #444; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.4rem .2rem 0; vertical-align: top; }
th { font-weight: 600; } tr + tr { border-top: 1px solid #e3e3e3; } td.n, th.n { text-align: right; }
td, .legend { font-variant-numeric: tabular-nums; }
.tables, .charts { display: flex; flex-wrap: wrap; gap: 1rem 3rem; }
.tables { align-items: flex-start; } .charts { gap: 1rem 1.5rem; }
figure { margin: 0; width: 28rem; max-width: 100%; break-inside: avoid; }
figcaption { font-weight: 600; } figure > svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: #444; } svg .grid { stroke: #e3e3e3; }
.legend { font-size: .85rem; color: #333; } .legend span { margin-right: 1.2rem; } .none { color: #666; }
article { border-top: 1px solid #bbb; padding: .8rem 0; break-inside: avoid; }
article > div { display: flex; gap: 1.4rem; flex-wrap: wrap; }
.images { flex: 0 0 auto; max-width: 20rem; }
.images img { max-width: 100%; min-width: 9rem; display: block; margin-bottom: .4rem; border: 1px solid #ccc; }
.texts { flex: 1 1 24rem; display: grid; grid-template-columns: 1fr 1fr; gap: .2rem 1.4rem; min-width: 0;
       align-content: start; }
.texts .wide { grid-column: 1 / -1; } h3 { font-size: .85rem; margin: .4rem 0 0; color: #444; }
.scores { color: #444; font-size: .85rem; margin: 0 0 .3rem; }
pre { font: 13px/1.4 ui-monospace, "Liberation Mono", Menlo, monospace; margin: 0; white-space: pre-wrap;
      overflow-wrap: anywhere; unicode-bidi: isolate; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } a { color: inherit; } }
@media (max-width: 40rem) { .texts { grid-template-columns: 1fr; } }
"""


@dataclass(frozen=True, eq=False)
class Sample:
    """One rollout as it is shown. ``scores`` by tower are None where the rollout was not judged."""

    images: Sequence[Image.Image]
    prompt: str
    response: str
    reference: str
    problem: str | None
    """why the response is not valid; None if it is"""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    reference_scores: Mapping[str, float | None] = field(default_factory=dict)


def write_report(
    path: Path, *, title: str, rows: Sequence[Row], summary: Mapping[str, Any], samples: Sequence[Sample]
) -> None:
    """Write the page in one rename. ``rows`` are those of ``metrics.jsonl``, ``summary`` that of ``summary.json``."""
    layout = " · ".join(f"{axis.upper()}{size}" for axis, size in summary["layout"].items())
    lead = (
        f"{summary['steps']} steps on {summary['world_size']} ranks ({layout}), megatron-core "
        f"{summary['megatron_core']}, torch {summary['torch']}. Figures are means over the last "
        f"{summary['window_steps']} steps unless a step is named."
    )
    body = (
        f"<section class='tables'>{_game_table(summary)}{_time_table(summary)}</section>"
        f"<h2>Curves</h2><section class='charts'>{_charts(rows)}</section>"
        f"<h2>Sample rollouts</h2>{''.join(_article(sample) for sample in samples)}"
        f"<h2>Files</h2>{_files_table(summary)}"
    )
    write_page(path, title=title, lead=lead, body=body)


def write_page(path: Path, *, title: str, lead: str, body: str) -> None:
    """Write a page that stands alone around ``body``, which is HTML; ``title`` and ``lead`` are text."""
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(title)}</h1><p class='lead'>{_text(lead)}</p>{body}</body></html>\n"
    )
    write_atomically(path, page)


def _game_table(summary: Mapping[str, Any]) -> str:
    heads = "".join(f"<th class='n'>{head}</th>" for head in ("Reward gap", "Accuracy", "Pairs", "AUC", "Length"))
    body = ""
    for tower in TOWER_NAMES:
        auc = f"{_figure(summary['auc'][tower], '.2f')} of {summary['auc_pairs'][tower]:,}"
        figures = (
            _figure(summary["reward_gap"][tower], "+.2f"),
            _figure(summary["disc_accuracy"][tower], ".2f"),
            f"{summary['pairs'][tower]:,}",
            auc if summary["auc_pairs"][tower] else "–",
            _figure(summary["length_correlation"][tower], "+.2f"),
        )
        body += f"<tr><td>{tower}</td>{_cells(figures)}</tr>"
    others = {
        "Valid": f"{_figure(summary['valid_share'], '.2f')} of {summary['rollouts']:,} rollouts",
        "Towers agree": _figure(summary["tower_agreement"], "+.2f"),
        "Rollbacks": f"{summary['rollbacks']:,}",
    }
    body += "".join(f"<tr><td>{name}</td><td colspan='5'>{value}</td></tr>" for name, value in others.items())
    return f"<table><tr><th>Tower</th>{heads}</tr>{body}</table>"


def _cells(figures: Sequence[str]) -> str:
    return "".join(f"<td class='n'>{figure}</td>" for figure in figures)


def _time_table(summary: Mapping[str, Any]) -> str:
    body = "".join(
        f"<tr><td>{_text(phase.replace('_', ' '))}</td><td class='n'>{format_seconds(seconds)}</td></tr>"
        for phase, seconds in summary["seconds_by_phase"].items()
    )
    speed = _figure(summary["tokens_per_second"], ",.0f")
    body += f"<tr><td>Response tokens a second</td><td class='n'>{speed}</td></tr>"
    return f"<table><tr><th>Phase</th><th class='n'>Time</th></tr>{body}</table>"


def _files_table(summary: Mapping[str, Any]) -> str:
    files = (("Aligned policy (Hugging Face)", "hf_export"), ("Checkpoint", "checkpoint"))
    body = "".join(f"<tr><td>{name}</td><td>{_text(str(summary[key] or '–'))}</td></tr>" for name, key in files)
    return f"<table>{body}</table>"


def _charts(rows: Sequence[Row]) -> str:
    def curve(key: str) -> list[tuple[float, float | None]]:
        return [(number(row, "step") or 0.0, number(row, key)) for row in rows]

    charts = [
        *game_charts(rows),
        line_chart("Valid rollouts", {"valid": curve("valid_share")}, share=True),
        line_chart("Tokens in a response", {"tokens": _ratio(rows, "response_tokens", "rollouts")}),
    ]
    if any("truth/responses" in row for row in rows):
        truths = {
            "caption items": curve("truth/item_accuracy"),
            "reasoning steps": curve("truth/step_validity"),
            "answer": curve("truth/answer_right"),
        }
        charts.append(line_chart("Right against the known truth of the scenes", truths, share=True))
    norms = {role: curve(f"{role}_grad_norm") for role in ("policy", "discriminator")}
    seconds = [(number(row, "step") or 0.0, step_seconds(row)) for row in rows]
    charts += [line_chart("Gradient norm", norms), line_chart("Seconds a step", {"seconds": seconds})]
    return "".join(charts)


def _ratio(rows: Sequence[Row], key: str, count_key: str) -> list[tuple[float, float | None]]:
    points: list[tuple[float, float | None]] = []
    for row in rows:
        value, count = number(row, key), number(row, count_key)
        points.append((number(row, "step") or 0.0, value / count if value is not None and count else None))
    return points


def _article(sample: Sample) -> str:
    images = "".join(f"<img alt='image of the prompt' src='{_data_url(image)}'>" for image in sample.images)
    verdict = "valid" if sample.problem is None else f"not valid: {sample.problem}"
    return (
        f"<article><div><div class='images'>{images}</div><div class='texts'>"
        f"<div class='wide'><h3>Prompt</h3><pre>{_text(sample.prompt)}</pre></div>"
        f"<div><h3>Rollout ({_text(verdict)})</h3>{_scores(sample.scores)}<pre>{_text(sample.response)}</pre></div>"
        f"<div><h3>Reference</h3>{_scores(sample.reference_scores)}<pre>{_text(sample.reference)}</pre></div>"
        "</div></div></article>"
    )


def _scores(scores: Mapping[str, float | None]) -> str:
    if not scores:
        return ""
    figures = ", ".join(f"{_text(tower)} {_figure(score, '+.2f')}" for tower, score in scores.items())
    return f"<p class='scores'>scores: {figures}</p>"


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _data_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_MAX_IMAGE_SIDE, _MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _text(text: str) -> str:
    """Escaped text without control, direction-changing and unpaired surrogate characters; long text is cut."""
    kept = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd" for c in text)
    if len(kept) > _MAX_CHARACTERS:
        kept = f"{kept[:_MAX_CHARACTERS]}… ({len(kept) - _MAX_CHARACTERS:,} more characters)"
    return escape(kept, quote=True)
