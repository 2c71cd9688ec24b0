"""Both towers at a glance: the table on the terminal and the one in the report, of every stage with a discriminator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism_megatron.evaluation.page import figure_of
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.progress import Columns
from prism_megatron.observability.summary import number
from prism_megatron.types import TOWER_NAMES


def _cells(row: Row) -> str:
    gaps = [_cell(row, f"{name}/reward_gap", "+.2f") for name in TOWER_NAMES]
    accuracies = [_cell(row, f"{name}/accuracy", ".2f") for name in TOWER_NAMES]
    valid = _cell(row, "valid_share", ".2f")
    return f"{gaps[0]:>10}  {gaps[1]:>7} | {accuracies[0]:>10}  {accuracies[1]:>7} | {valid:>5}"


def _cell(row: Row, name: str, form: str) -> str:
    value = number(row, name)
    return "-" if value is None else format(value, form)


GAME_COLUMNS = Columns(
    groups="    reward gap      | discriminator right |      ",
    heads="perception  reason. | perception  reason. | valid",
    cells=_cells,
)


def game_table(summary: Mapping[str, Any], others: Mapping[str, str]) -> str:
    """HTML of a ``game_summary``, tower by tower; ``others`` are named figures below it."""
    heads = "".join(f"<th class='n'>{head}</th>" for head in ("Reward gap", "Accuracy", "Pairs", "AUC", "Length"))
    body = ""
    for tower in TOWER_NAMES:
        auc = f"{figure_of(summary['auc'][tower], '.2f')} of {summary['auc_pairs'][tower]:,}"
        figures = (
            figure_of(summary["reward_gap"][tower], "+.2f"),
            figure_of(summary["disc_accuracy"][tower], ".2f"),
            f"{summary['pairs'][tower]:,}",
            auc if summary["auc_pairs"][tower] else "–",
            figure_of(summary["length_correlation"][tower], "+.2f"),
        )
        body += f"<tr><td>{tower}</td>{_html_cells(figures)}</tr>"
    valid = {"Valid": f"{figure_of(summary['valid_share'], '.2f')} of {summary['rollouts']:,} rollouts"}
    named = {**valid, **others}
    body += "".join(f"<tr><td>{name}</td><td colspan='5'>{value}</td></tr>" for name, value in named.items())
    return f"<table><tr><th>Tower</th>{heads}</tr>{body}</table>"


def _html_cells(figures: Sequence[str]) -> str:
    return "".join(f"<td class='n'>{figure}</td>" for figure in figures)
