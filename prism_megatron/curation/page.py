"""The page of a curation. What models wrote is hostile: all text goes through ``evaluation/page.text_of``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from prism_megatron.curation.files import Row
from prism_megatron.curation.report import Findings
from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.reading.intake import ImageError
from prism_megatron.disk import write_atomically, writing
from prism_megatron.evaluation.page import text_of, write_page
from prism_megatron.evaluation.sample import png_url

SUMMARY, PAGE = "summary.json", "report.html"
_NOTES_SHOWN = 4


def write_report(folder: Path, findings: Findings) -> dict[str, Any]:
    """Write ``summary.json`` and ``report.html`` whole, and return the summary. Raises DiskError."""
    summary = findings.summary()
    with writing(folder / SUMMARY):
        write_atomically(folder / SUMMARY, f"{json.dumps(summary, indent=1)}\n")
    steps = summary["steps"]
    lead = f"{steps[0]['problems']:,} problems, {steps[-1]['kept']:,} kept after {steps[-1]['step']}." if steps else ""
    with writing(folder / PAGE):
        write_page(folder / PAGE, title="Curation", lead=lead, body="".join(_body(summary, findings)))
    return summary


def _body(summary: Mapping[str, Any], findings: Findings) -> Iterator[str]:
    yield f"<h2>What became of the problems</h2>{_steps_table(summary)}"
    if summary["sets"]:
        yield f"<h2>Sets</h2>{_sets_table(summary)}"
    if summary["usage"]:
        yield f"<h2>Answers</h2>{_usage_table(summary)}<h2>What they came to</h2>{_outcomes_table(summary)}"
    if any(summary["teacher_replies"].values()):
        yield f"<h2>Replies of the teacher to a problem</h2>{_attempts_table(summary)}"
    yield f"<h2>Prompts</h2>{_table(('Prompt', 'Version'), summary['prompts'].items())}"
    for (step, verdict), rows in findings.examples.items():
        yield f"<h2>{text_of(f'{step}: {verdict}')}</h2>{''.join(map(_article, rows))}"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [_cells("th", head), *(_cells("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _cells(tag: str, cells: Sequence[object]) -> str:
    first, *rest = (text_of(f"{one:,}" if isinstance(one, int) else str(one)) for one in cells)
    numbers = "".join(f"<{tag} class='n'>{one}</{tag}>" for one in rest)
    return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"


def _steps_table(summary: Mapping[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for one in summary["steps"]:
        rows.append((one["step"], one["problems"], one["kept"]))
        rows += [(f"– {why}", count, "") for why, count in one["fallen"].items()]
    return _table(("Step", "Problems", "Kept"), rows)


def _sets_table(summary: Mapping[str, Any]) -> str:
    rows = [
        (name, one["records"], *(f"{one[key]:.3f}" for key in ("mean_score", "least_score", "largest_score")))
        for name, one in summary["sets"].items()
    ]
    return _table(("Set", "Records", "Mean score", "Least", "Largest"), rows)


def _usage_table(summary: Mapping[str, Any]) -> str:
    rows = [
        (role, one["model"], one["calls"], one["prompt_tokens"], one["answer_tokens"], f"{one['cost']:.4f}")
        for role, one in summary["usage"].items()
    ]
    return _table(("Role", "Model", "Answers", "Tokens of prompts", "Tokens of answers", "Cost"), rows)


def _outcomes_table(summary: Mapping[str, Any]) -> str:
    rows = [(role, what, count) for role, counts in summary["outcomes"].items() for what, count in counts.items()]
    return _table(("Role", "Outcome", "Answers"), rows)


def _attempts_table(summary: Mapping[str, Any]) -> str:
    replies = summary["teacher_replies"]
    numbers = sorted({number for counts in replies.values() for number in counts})
    rows = [(str(number), *(counts.get(number, 0) for counts in replies.values())) for number in numbers]
    note = f"<p>{summary['kept_unaided']:,} were kept without the answer being told.</p>"
    return note + _table(("Replies", *replies), rows)


def _article(row: Row) -> str:
    problem = row.problem
    texts = [("Question", problem.asked), ("Right is", problem.answer)]
    if row.detail:
        texts.append(("Because", row.detail))
    answer = row.found.get("answer", {})
    texts += [(name.capitalize(), answer[name]) for name in ("caption", "solution", "answered") if name in answer]
    notes = [note for one in row.found.values() for note in one.get("calls", ()) if "excerpt" in note]
    texts += [
        (f"{note['role']}, {note.get('phase', 'reply')} {note['number'] + 1}: {note['outcome']}", note["excerpt"])
        for note in notes[-_NOTES_SHOWN:]
    ]
    if "split" in row.found:
        texts.append(("Score", f"{row.found['split']['score']:.3f} → {row.found['split']['to']}"))
    boxes = "".join(
        f"<div class='wide'><h3>{text_of(name)}</h3><pre>{text_of(text)}</pre></div>" for name, text in texts
    )
    texts_box = f"<div class='texts'><div class='wide'><h3>{text_of(problem.id)}</h3></div>{boxes}</div>"
    return f"<article><div><div class='images'>{_image(row)}</div>{texts_box}</div></article>"


def _image(row: Row) -> str:
    try:
        url = png_url(to_rgb(open_image(row.problem.image_path)))
    except ImageError as error:
        return f"<p class='none'>{text_of(str(error))}</p>"
    return f"<img alt='image of the question' src='{escape(url, quote=True)}'>"
