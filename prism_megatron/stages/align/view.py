"""What is shown of an alignment: the game, the answers and, where the scenes are known, how right they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism_megatron.evaluation.game_charts import answer_charts, game_charts
from prism_megatron.evaluation.game_summary import game_summary
from prism_megatron.evaluation.game_table import GAME_COLUMNS, game_table
from prism_megatron.evaluation.held_out import held_out_charts, held_out_summary, held_out_table
from prism_megatron.evaluation.page import figure_of
from prism_megatron.evaluation.view import StageView
from prism_megatron.observability.metrics import Row


def _summarise(rows: Sequence[Row]) -> Mapping[str, Any]:
    return {**game_summary(rows), **held_out_summary(rows)}


def _tables(summary: Mapping[str, Any]) -> Sequence[str]:
    others = {
        "Towers agree": figure_of(summary["tower_agreement"], "+.2f"),
        "Rollbacks": f"{summary['rollbacks']:,}",
    }
    if (best := summary.get("best_held_out_accuracy")) is not None:
        others["Best held-out accuracy, sampled"] = figure_of(best, ".3f")
    return [game_table(summary, others), *held_out_table(summary)]


def _charts(rows: Sequence[Row]) -> Sequence[str]:
    return [*game_charts(rows), *answer_charts(rows), *held_out_charts(rows)]


VIEW = StageView(GAME_COLUMNS, _summarise, _tables, _charts)
