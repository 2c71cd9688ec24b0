"""How the rows of a stage are shown: in the table, in the summary and in the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.observability.metrics import Row
from prism_megatron.observability.progress import Columns


@dataclass(frozen=True)
class StageView:
    """What is shown of any run of a stage. It needs rows alone, so that a report is made without building the stage.

    Example: ``stages/align/view.py``.
    """

    columns: Columns
    """of the table on the terminal"""
    summarise: Callable[[Sequence[Row]], Mapping[str, Any]]
    """what the summary of a run with these rows has beyond the figures of all stages"""
    tables: Callable[[Mapping[str, Any]], Sequence[str]]
    """HTML of what the report shows of a summary, beside the time table of all stages"""
    charts: Callable[[Sequence[Row]], Sequence[str]]
    """HTML of the stage's curves, as :func:`evaluation.charts.line_chart` makes them; empty ones are left out"""
