"""What checks find: the lines of a table, and of a JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "FAILS", "measured", "skipped"]


@dataclass(frozen=True)
class Row:
    """One figure. ``limit`` is the most that ``value`` may be, or the least where ``at_least``; ``note`` says why."""

    what: str
    verdict: Verdict
    value: float | None = None
    unit: str = ""
    limit: float | None = None
    at_least: bool = False
    note: str = ""


def within(what: str, value: float, limit: float, unit: str = "", *, at_least: bool = False, note: str = "") -> Row:
    """A figure that has to hold. NaN never does."""
    holds = value >= limit if at_least else value <= limit
    return Row(what, "holds" if holds else "FAILS", value, unit, limit, at_least, note)


def measured(what: str, value: float, unit: str, note: str = "") -> Row:
    """A figure that is reported and nothing is asked of."""
    return Row(what, "measured", value, unit, note=note)


def skipped(what: str, why: str) -> Row:
    """What is missing here, by name."""
    return Row(what, "skipped", note=why)


def failed(what: str, why: str) -> Row:
    """What came to no figure."""
    return Row(what, "FAILS", note=why)


def lines(found: Mapping[str, Sequence[Row]]) -> list[str]:
    """The table: a line for each figure, by check."""
    cells = [
        (check, row.what, _figure(row.value, row.unit), _limit(row), row.verdict, row.note)
        for check, rows in found.items()
        for row in rows
    ]
    header = ("check", "what", "figure", "limit", "verdict", "note")
    widths = [max(len(cell[column]) for cell in (header, *cells)) for column in range(len(header) - 1)]
    return [
        "  ".join((*(f"{text:<{width}}" for text, width in zip(cell, widths, strict=False)), cell[-1])).rstrip()
        for cell in (header, *cells)
    ]


def document(machine: Mapping[str, object], found: Mapping[str, Sequence[Row]]) -> str:
    """The same as JSON: what the machine is, and every row. What is not finite is null."""
    checks = {check: [_plain(row) for row in rows] for check, rows in found.items()}
    return json.dumps({"machine": machine, "checks": checks}, indent=2, allow_nan=False) + "\n"


def _plain(row: Row) -> dict[str, object]:
    fields = dataclasses.asdict(row)
    if row.value is not None and not abs(row.value) < float("inf"):
        fields["value"] = None
    return fields


def _limit(row: Row) -> str:
    if row.limit is None:
        return ""
    return f"{'>=' if row.at_least else '<='} {_figure(row.limit, row.unit)}"


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}".rstrip()
