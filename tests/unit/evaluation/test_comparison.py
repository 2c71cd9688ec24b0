"""The tables show every figure where it belongs, and nothing where there is none; text in the page cannot act."""

from __future__ import annotations

import json
from pathlib import Path

from prism_megatron.evaluation.bootstrap import Interval
from prism_megatron.evaluation.comparison import Comparison, Line, write_comparison

COMPARISON = Comparison(
    title="Two <runs>",
    lead="made up",
    columns={"before": "the start", "dense": "--routing dense"},
    sections={
        "Levels": [
            Line("greedy", "tokens", {"dense": Interval(41.26, 40.0, 42.5), "before": Interval(0.5, 0.25, 0.75)}),
        ],
        "Changes": [Line("T=1", "items", {"before": None, "dense": Interval(-0.1, -0.2, 0.0)})],
    },
)


def test_text_keeps_the_order_of_the_columns() -> None:
    text = COMPARISON.as_text()
    assert "| sampling | measure | before | dense |" in text
    assert "| greedy | tokens | 0.500 [0.250, 0.750] | 41.3 [40.0, 42.5] |" in text
    assert "| T=1 | items | – | -0.100 [-0.200, 0.000] |" in text


def test_document_has_null_where_there_is_no_figure() -> None:
    document = json.loads(json.dumps(COMPARISON.as_document()))
    assert document["columns"] == {"before": "the start", "dense": "--routing dense"}
    changes = document["sections"]["Changes"]["T=1/items"]
    assert changes == {"before": None, "dense": {"mean": -0.1, "low": -0.2, "high": 0.0}}


def test_page_shows_flags_and_figures_and_escapes_text(tmp_path: Path) -> None:
    write_comparison(tmp_path / "report.html", COMPARISON)
    page = (tmp_path / "report.html").read_text()
    assert "Two &lt;runs&gt;" in page
    assert "Two <runs>" not in page
    assert "<td>--routing dense</td>" in page
    assert "<td class='n'>41.3 [40.0, 42.5]</td>" in page
    assert "default-src 'none'" in page
