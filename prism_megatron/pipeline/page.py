"""``report.html`` of a pipeline: the table, the curves of all stages, and the same questions answered after each.

What a model wrote, and what a file is called, is hostile text: all of it goes through ``evaluation/page.text_of``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from prism_megatron.config.pipeline.file import BASE
from prism_megatron.evaluation.benchmark.answers import Answered
from prism_megatron.evaluation.charts import line_chart
from prism_megatron.evaluation.page import text_of, write_page
from prism_megatron.pipeline.plan import Plan
from prism_megatron.pipeline.results import FORM, GREEDY, rows_of, stages_of
from prism_megatron.pipeline.samples import SideBySide
from prism_megatron.pipeline.table import HEADS, Line, cells_of, lines_of
from prism_megatron.run.files import REPORT


def write_pipeline_page(path: Path, plan: Plan, results: Mapping[str, Any], samples: Sequence[SideBySide]) -> None:
    """Write the page in one rename."""
    lines = lines_of(plan, results)
    body = f"<h2>Stages</h2>{_table(lines)}<h2>Reports</h2>{_links(plan, results)}{_curves(plan, results, lines)}"
    if samples:
        body += f"<h2>The same questions after each stage</h2>{''.join(map(_article, samples))}"
    write_page(path, title=f"Pipeline {plan.title}", lead=_lead(results), body=body)


def _lead(results: Mapping[str, Any]) -> str:
    done, left = len(results["steps"]), len(results["left"])
    skipped = f" Skipped: {', '.join(results['skipped'])}." if results["skipped"] else ""
    return (
        f"{done} of {done + left} steps are done.{skipped} Answers are greedy, to the same questions after "
        "every stage; intervals are bootstraps over questions."
    )


def _table(lines: Sequence[Line]) -> str:
    head = "".join(f"<th>{text_of(name)}</th>" for name in HEADS)
    rows = "".join(f"<tr>{''.join(f'<td>{text_of(cell)}</td>' for cell in cells_of(line))}</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _links(plan: Plan, results: Mapping[str, Any]) -> str:
    """To the page that each step wrote itself."""
    done = [one["name"] for one in results["steps"] if (plan.output / one["name"] / REPORT).is_file()]
    rows = "".join(
        f"<tr><td><a href='{escape(name, quote=True)}/{REPORT}'>{text_of(name)}</a></td></tr>" for name in done
    )
    return f"<table>{rows}</table>" if rows else "<p class='none'>none yet</p>"


def _curves(plan: Plan, results: Mapping[str, Any], lines: Sequence[Line]) -> str:
    parts = []
    answers = _answers_by_steps(lines)
    if answers:
        parts.append(
            f"<h2>Held-out answers over all steps of the policy</h2><section class='charts'>{answers}</section>"
        )
    done = {one["name"] for one in results["steps"]}
    for step in stages_of(plan):
        if step.tool.view is not None and step.key in done:
            charts = "".join(step.tool.view.charts(rows_of(plan, step)))
            parts.append(f"<h2>Curves of {text_of(step.stage)}</h2><section class='charts'>{charts}</section>")
    return "".join(parts)


def _answers_by_steps(lines: Sequence[Line]) -> str:
    """After how many steps of which stage the policy answers how many questions right."""
    points: dict[str, list[tuple[float, float | None]]] = {"right": [], "in the asked form": []}
    total = 0
    for line in lines:
        if line.evaluation is None:
            continue
        total += 0 if line.name == BASE or line.done is None else line.done["steps"]
        for name, measure in zip(points, (GREEDY, FORM), strict=True):
            plain = line.evaluation["figures"].get(measure)
            points[name].append((total, None if plain is None else plain["mean"]))
    return line_chart("Held-out questions", points, share=True)


def _article(one: SideBySide) -> str:
    image = f"<img alt='image of the question' src='{escape(one.image, quote=True)}'>"
    answers = "".join(_answer(name, answer) for name, answer in one.answers)
    return (
        f"<article><div><div class='images'>{image}</div><div class='texts'>"
        f"<div class='wide'><h3>Question</h3><pre>{text_of(one.question)}</pre></div>"
        f"<div class='wide'><h3>Right is</h3><pre>{text_of(one.gold)}</pre></div>{answers}</div></div></article>"
    )


def _answer(name: str, answer: Answered) -> str:
    verdict = "right" if answer.counts else "right, in another form" if answer.right else "wrong"
    said = "; ".join(one for one in (verdict, answer.problem, answer.failure) if one)
    when = "before" if name == BASE else f"after {name}"
    return f"<div><h3>{text_of(f'{when}: {said}')}</h3><pre>{text_of(answer.text)}</pre></div>"
