"""The table of a pipeline's report, a row for the base and for every stage: for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.config.pipeline.file import BASE
from prism_megatron.evaluation.bootstrap import Interval
from prism_megatron.evaluation.comparison import figure_text
from prism_megatron.pipeline.drift import MEASURED
from prism_megatron.pipeline.plan import EVALUATIONS, STAGES, Plan
from prism_megatron.pipeline.results import FORM, GREEDY, TOKENS, evaluation_of, stages_of


@dataclass(frozen=True)
class Line:
    """One row: a stage that is done or not, or the base."""

    name: str
    tool: str
    done: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    minutes: float | None
    """of the stage and of its evaluation"""


def lines_of(plan: Plan, results: Mapping[str, Any]) -> list[Line]:
    """The base, where it is evaluated, and all stages, in order."""
    base = evaluation_of(results, BASE)
    lines = [] if base is None else [_line(BASE, "–", results)]
    return [*lines, *(_line(step.stage, step.tool.name, results) for step in stages_of(plan))]


def cells_of(line: Line) -> list[str]:
    """What the row says, under ``HEADS``."""
    return [cell(line) for _, cell in _COLUMNS]


def text_table(lines: Sequence[Line]) -> list[str]:
    """The table for a terminal."""
    cells = [list(HEADS), *map(cells_of, lines)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(HEADS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _line(name: str, tool: str, results: Mapping[str, Any]) -> Line:
    key = f"{STAGES}/{name}"
    done = next((one for one in results["steps"] if one["name"] == key), None)
    parts = [results["minutes"][one] for one in (key, f"{EVALUATIONS}/{name}") if one in results["minutes"]]
    return Line(name, tool, done, evaluation_of(results, name), sum(parts) if parts else None)


def _steps(line: Line) -> str:
    if line.done is None:
        return "–" if line.name == BASE else "not done"
    if "selection" in line.done:
        return f"{line.done['selection']['selected']} of {line.done['selection']['prompts']} prompts"
    added = line.done["added_steps"]
    return f"{line.done['steps']} ({added} of skipped stages)" if added else str(line.done["steps"])


def _measure(name: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        plain = None if line.evaluation is None else line.evaluation["figures"].get(name)
        return figure_text(None if plain is None else Interval(**plain))

    return cell


def _change(line: Line) -> str:
    """Greedy answers beside those of the base, question by question."""
    paired = [] if line.evaluation is None else line.evaluation["against_base"]
    found = next((one for one in paired if one["measure"] == GREEDY), None)
    if found is None:
        return "–"
    change = found["change"]
    return f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]: {found['verdict']}"


def _drift(line: Line) -> str:
    """Of the form of greedy answers, from the base's."""
    found = None if line.evaluation is None else line.evaluation["drift_from_base"]
    if found is None:
        return "–"
    return " / ".join("–" if found[name] is None else f"{found[name]:.2f}" for name in MEASURED)


def _minutes(line: Line) -> str:
    return "–" if line.minutes is None else f"{line.minutes:.1f}"


_COLUMNS: Sequence[tuple[str, Callable[[Line], str]]] = (
    ("stage", lambda line: line.name),
    ("tool", lambda line: line.tool),
    ("steps", _steps),
    ("right, greedy [95 %]", _measure(GREEDY)),
    ("change from the base", _change),
    ("in the asked form", _measure(FORM)),
    ("tokens", _measure(TOKENS)),
    ("items / steps from the base", _drift),
    ("minutes", _minutes),
)
"""Head and cell of every column, in order: a new one stands here, and reads what ``results.py`` has put into a line."""
HEADS = tuple(head for head, _ in _COLUMNS)
