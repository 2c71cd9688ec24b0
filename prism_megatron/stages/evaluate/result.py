"""Figures, comparison and page of a finished evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config.merge import merge
from prism_megatron.config.resume import differences
from prism_megatron.config.tools.evaluate import EvaluateConfig
from prism_megatron.disk import write_atomically, writing
from prism_megatron.evaluation.benchmark.answers import Answered, by_item
from prism_megatron.evaluation.benchmark.folder import PAGE, SUMMARY, Evaluated, check_same_questions
from prism_megatron.evaluation.benchmark.metrics import summary_of
from prism_megatron.evaluation.benchmark.page import Shown, write_evaluation_page
from prism_megatron.evaluation.benchmark.paired import RULE, Paired, compare_all
from prism_megatron.evaluation.bootstrap import Interval
from prism_megatron.evaluation.comparison import figure_text
from prism_megatron.evaluation.sample import png_url
from prism_megatron.stages.evaluate.questions import Question

_MAY_DIFFER = ("--model", "--against", "--served-model", "--served-files", "--dtype", "--shown")


@dataclass(frozen=True)
class Result:
    """What came of it, for a file and for the terminal."""

    summary: dict[str, Any]
    lines: Sequence[str]


def write_result(
    folder: Path,
    questions: Sequence[Question],
    answers: Sequence[Answered],
    config: EvaluateConfig,
    base: Evaluated | None,
) -> Result:
    """Write ``summary.json`` and ``report.html`` whole.

    Raises ConfigError where ``base`` was asked other questions, DiskError, and ImageError for an image that is gone.
    """
    own = list(by_item(answers).values())
    summary = summary_of([one.item for one in questions], own)
    paired: list[Paired] = []
    if base is not None:
        check_same_questions(answers, base)
        paired = compare_all(answers, base.answers)
        summary["against"] = {
            "folder": str(base.folder),
            "rule": RULE,
            "measures": [one.to_plain() for one in paired],
            "notes": _notes(config, answers, base),
        }
    with writing(folder / SUMMARY):
        write_atomically(folder / SUMMARY, f"{json.dumps(summary, indent=1)}\n")
        write_evaluation_page(
            folder / PAGE,
            summary,
            _shown(questions, own, config.shown),
            paired,
            title=f"Evaluation of {config.model}",
            lead=f"{summary['questions']} questions, {summary['answers']} answers, {summary['failures']} failures.",
        )
    return Result(summary, [*lines_of(summary), *_paired_lines(summary, paired)])


def lines_of(summary: dict[str, Any]) -> list[str]:
    """The figures as a table of text."""
    lines = [f"{'mean over ' + str(summary['questions']) + ' questions':<34} 95 % interval"]
    for name, plain in summary["figures"].items():
        lines.append(f"{name:<34} {figure_text(None if plain is None else Interval(**plain))}")
    if summary["failures"]:
        lines.append(f"{summary['failures']} of {summary['answers']} answers failed, and count as wrong:")
        lines += [f"  {count} × {why}" for why, count in summary["failed_because"].items()]
    return lines


def _paired_lines(summary: dict[str, Any], paired: Sequence[Paired]) -> list[str]:
    if not paired:
        return []
    lines = [f"against {summary['against']['folder']}, question by question:"]
    lines += [
        f"{one.measure:<22} {one.base:.3f} -> {one.own:.3f}  {figure_text(one.change)}  p {one.p:.4f}  "
        f"+{one.gained} -{one.lost}  {one.verdict}"
        for one in paired
    ]
    return [*lines, f"rule: {RULE}", *summary["against"]["notes"]]


def _notes(config: EvaluateConfig, answers: Sequence[Answered], base: Evaluated) -> list[str]:
    """What a reader of the comparison has to know beside the figures."""
    changed = differences(merge(EvaluateConfig(), base.config), config)
    notes = [
        f"asked otherwise: {one}" for one in changed if one.flag not in _MAY_DIFFER and one.on_resume.name == "FIXED"
    ]
    failed = [sum(bool(one.failure) for one in some) for some in (base.answers, answers)]
    if any(failed):
        notes.append(f"{failed[0]} answers there and {failed[1]} here failed, and count as wrong")
    return notes


def _shown(questions: Sequence[Question], answers: Sequence[Sequence[Answered]], count: int) -> list[Shown]:
    """Some from all over, in their order."""
    step = max(1, -(-len(questions) // count)) if count else len(questions) + 1
    places = range(0, len(questions), step) if count else ()
    return [Shown(png_url(questions[i].image()), questions[i].text, questions[i].gold, answers[i]) for i in places]
