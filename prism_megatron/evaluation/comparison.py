"""Runs side by side: a table a section, a column a run, every figure with its interval; as text, JSON and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from prism_megatron.evaluation.bootstrap import Interval
from prism_megatron.evaluation.page import write_page


@dataclass(frozen=True)
class Line:
    """One measure under one way of sampling; a column without data is None."""

    mode: str
    measure: str
    figures: Mapping[str, Interval | None]


@dataclass(frozen=True)
class Comparison:
    """``columns`` names the runs in order, each with what sets it apart; ``sections`` are tables by title."""

    title: str
    lead: str
    columns: Mapping[str, str]
    sections: Mapping[str, Sequence[Line]]

    def as_document(self) -> dict[str, Any]:
        """The figures for a JSON file: section, "mode/measure", column, then mean, low and high or null."""
        return {
            "title": self.title,
            "columns": dict(self.columns),
            "sections": {
                title: {
                    f"{line.mode}/{line.measure}": {
                        column: None if figure is None else figure._asdict() for column, figure in line.figures.items()
                    }
                    for line in lines
                }
                for title, lines in self.sections.items()
            },
        }

    def as_text(self) -> str:
        """Markdown."""
        parts = [f"{self.title}; {self.lead}"]
        for title, lines in self.sections.items():
            head = f"| sampling | measure | {' | '.join(self.columns)} |"
            body = [f"| {line.mode} | {line.measure} | {' | '.join(self._cells(line))} |" for line in lines]
            parts.append("\n".join([f"**{title}**", "", head, "|---" * (2 + len(self.columns)) + "|", *body]))
        return "\n\n".join(parts) + "\n"

    def _cells(self, line: Line) -> list[str]:
        return [figure_text(line.figures.get(column)) for column in self.columns]

    def as_html(self) -> str:
        """The body of a page."""
        flags = "".join(
            f"<tr><td>{escape(column)}</td><td>{escape(what)}</td></tr>" for column, what in self.columns.items()
        )
        parts = [f"<h2>Runs</h2><table>{flags}</table>"]
        for title, lines in self.sections.items():
            head = "".join(f"<th class='n'>{escape(column)}</th>" for column in self.columns)
            rows = "".join(
                f"<tr><td>{escape(line.mode)}</td><td>{escape(line.measure)}</td>"
                + "".join(f"<td class='n'>{escape(cell)}</td>" for cell in self._cells(line))
                + "</tr>"
                for line in lines
            )
            parts.append(
                f"<h2>{escape(title)}</h2><table><tr><th>Sampling</th><th>Measure</th>{head}</tr>{rows}</table>"
            )
        return "".join(parts)


def figure_text(figure: Interval | None) -> str:
    """A figure with its interval, with three decimals below 10 and one above; a dash without data."""
    if figure is None:
        return "–"
    decimals = 3 if abs(figure.mean) < 10 else 1
    return f"{figure.mean:.{decimals}f} [{figure.low:.{decimals}f}, {figure.high:.{decimals}f}]"


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page in one rename."""
    write_page(path, title=comparison.title, lead=comparison.lead, body=comparison.as_html())
