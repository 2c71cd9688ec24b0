"""What is shown of a warm-start: the towers on their pairs, and the held-out pairs that its gate asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism_megatron.evaluation.game_charts import answer_charts, game_charts
from prism_megatron.evaluation.game_summary import game_summary
from prism_megatron.evaluation.game_table import GAME_COLUMNS, game_table
from prism_megatron.evaluation.page import figure_of
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import Row
from prism_megatron.types import TOWER_NAMES


def _tables(summary: Mapping[str, Any]) -> Sequence[str]:
    tables = [game_table(summary, {})]
    held_out = summary.get("held_out")
    if held_out:
        tables.append(_held_out_table(held_out))
    return tables


def _held_out_table(held_out: Mapping[str, Any]) -> str:
    """Figures of the pairs that no step had, named as in a row."""
    body = ""
    for tower in TOWER_NAMES:
        accuracy = figure_of(held_out.get(f"{tower}/accuracy"), ".2f")
        auc = figure_of(held_out.get(f"{tower}/auc"), ".2f")
        body += f"<tr><td>{tower}</td><td class='n'>{accuracy}</td><td class='n'>{auc}</td></tr>"
    return f"<table><tr><th>Held out</th><th class='n'>Accuracy</th><th class='n'>AUC</th></tr>{body}</table>"


def _charts(rows: Sequence[Row]) -> Sequence[str]:
    return [*game_charts(rows), *answer_charts(rows)]


VIEW = StageView(GAME_COLUMNS, game_summary, _tables, _charts)
