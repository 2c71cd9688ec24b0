"""The page of an evaluation: figures, a comparison where there is one, and questions with images and answers.

What a model wrote is hostile: all text goes through ``evaluation/page.text_of``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from prism_megatron.evaluation.benchmark.answers import Answered
from prism_megatron.evaluation.benchmark.paired import RULE, Paired
from prism_megatron.evaluation.bootstrap import Interval
from prism_megatron.evaluation.comparison import figure_text
from prism_megatron.evaluation.page import text_of, write_page

_ANSWERS_SHOWN = 3


@dataclass(frozen=True)
class Shown:
    """A question as the page shows it."""

    image: str
    """as a data URL, small"""
    question: str
    gold: str
    answers: Sequence[Answered]


def write_evaluation_page(
    path: Path,
    summary: Mapping[str, Any],
    shown: Sequence[Shown],
    paired: Sequence[Paired] = (),
    *,
    title: str,
    lead: str,
) -> None:
    """Write the page in one rename; ``summary`` is that of ``summary.json``."""
    body = f"<h2>Figures</h2>{_figures_table(summary)}"
    if paired:
        body += f"<h2>Against {text_of(str(summary['against']['folder']))}</h2>{_paired_table(summary, paired)}"
    if summary["groups"]:
        body += f"<h2>By group</h2>{_groups_table(summary)}"
    if summary["failures"]:
        body += f"<h2>Failures</h2>{_failures_table(summary)}"
    if shown:
        body += f"<h2>Questions</h2>{''.join(_article(one) for one in shown)}"
    write_page(path, title=title, lead=lead, body=body)


def _figure(plain: Mapping[str, float] | None) -> str:
    return text_of(figure_text(None if plain is None else Interval(**plain)))


def _row(*cells: str, head: bool = False) -> str:
    tag = "th" if head else "td"
    first, *rest = cells
    numbers = "".join(f"<{tag} class='n'>{one}</{tag}>" for one in rest)
    return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"


def _figures_table(summary: Mapping[str, Any]) -> str:
    rows = "".join(_row(text_of(name), _figure(figure)) for name, figure in summary["figures"].items())
    return f"<table>{_row('Measure', 'Mean over questions [95 %]', head=True)}{rows}</table>"


def _groups_table(summary: Mapping[str, Any]) -> str:
    measures = list(summary["groups"][0]["figures"])
    head = _row("Group", "Questions", *map(text_of, measures), head=True)
    rows = "".join(
        _row(
            f"{text_of(group['by'])}: {text_of(group['name'])}",
            str(group["questions"]),
            *(_figure(group["figures"][measure]) for measure in measures),
        )
        for group in summary["groups"]
    )
    return f"<table>{head}{rows}</table>"


def _paired_table(summary: Mapping[str, Any], paired: Sequence[Paired]) -> str:
    head = _row("Measure", "That one", "This one", "Change [95 %]", "p", "Gained", "Lost", "Verdict", head=True)
    rows = "".join(
        _row(
            text_of(one.measure),
            f"{one.base:.3f}",
            f"{one.own:.3f}",
            text_of(figure_text(one.change)),
            f"{one.p:.4f}",
            str(one.gained),
            str(one.lost),
            text_of(one.verdict),
        )
        for one in paired
    )
    notes = "".join(f"<p>{text_of(note)}</p>" for note in (RULE, *summary["against"]["notes"]))
    return f"<table>{head}{rows}</table>{notes}"


def _failures_table(summary: Mapping[str, Any]) -> str:
    rows = "".join(_row(text_of(why), str(count)) for why, count in summary["failed_because"].items())
    return (
        f"<p>{summary['failures']} of {summary['answers']} answers failed, and count as wrong.</p><table>{rows}</table>"
    )


def _article(one: Shown) -> str:
    first = one.answers[0]
    image = f"<img alt='image of the question' src='{escape(one.image, quote=True)}'>"
    answers = "".join(_answer(answer) for answer in one.answers[:_ANSWERS_SHOWN])
    return (
        f"<article><div><div class='images'>{image}</div><div class='texts'>"
        f"<div class='wide'><h3>{text_of(f'{first.set} {first.id}')}</h3><pre>{text_of(one.question)}</pre></div>"
        f"<div class='wide'><h3>Right is</h3><pre>{text_of(one.gold)}</pre></div>{answers}</div></div></article>"
    )


def _answer(answer: Answered) -> str:
    verdict = "right" if answer.counts else "right, in another form" if answer.right else "wrong"
    said = [verdict, *(one for one in (answer.problem, answer.failure and f"failed: {answer.failure}") if one)]
    return f"<div><h3>{text_of(f'{answer.mode}: ' + '; '.join(said))}</h3><pre>{text_of(answer.text)}</pre></div>"
