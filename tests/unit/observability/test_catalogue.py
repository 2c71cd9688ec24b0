"""Names of metrics have one home: what is written, read, summed up and documented is in the catalogue."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.evaluation.report import write_report
from prism_megatron.observability.catalogue import METRICS, UnknownMetricError, describe, page
from prism_megatron.observability.summary import RunFacts, pooled, summarise
from prism_megatron.stages.align.view import VIEW as ALIGN
from tests.golden.runs import RUNS

ROOT = Path(__file__).resolve().parents[3]
FACTS = RunFacts(
    world_size=1,
    layout={"tp": 1},
    hf_export=None,
    checkpoint=None,
    megatron_core="0",
    torch="0",
    other_seconds={},
)


def golden_rows(name: str) -> list[dict[str, Any]]:
    document = json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = document["rows"]
    return rows


class Watched(dict[str, Any]):
    """A row that notes which names it was asked for."""

    def __init__(self, row: dict[str, Any], asked: set[str]) -> None:
        super().__init__(row)
        self.asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def test_every_metric_that_runs_write_is_described() -> None:
    """The rows are those of real runs. Blind spot: a metric that none of them has."""
    for run in RUNS:
        for row in golden_rows(run):
            for name in row:
                assert describe(name).meaning


def test_a_count_stands_beside_every_figure_that_it_counts() -> None:
    for run in RUNS:
        for row in golden_rows(run):
            for name in row:
                count = describe(name).counted_by
                assert count is None or count in row or count == "response_tokens", (run, name, count)


def test_what_reads_rows_asks_for_known_names(tmp_path: Path) -> None:
    """Claim: the table, the summary and the report cannot ask for a misspelt metric, which would be empty for ever."""
    asked: set[str] = set()
    rows = [Watched(row, asked) for row in golden_rows("align_tp1")]
    summary = {**summarise(rows, FACTS), **ALIGN.summarise(rows)}
    write_report(tmp_path / "report.html", title="t", view=ALIGN, rows=rows, summary=summary, samples=[])
    ALIGN.columns.cells(rows[0])
    assert len(asked) > 30
    for name in asked:
        assert describe(name).meaning


def test_placeholders_are_filled_alike_in_name_and_count() -> None:
    assert describe("reasoning/auc").counted_by == "reasoning/auc_pairs"
    assert describe("probe/perception/accuracy").counted_by == "probe/perception/pairs"
    assert describe("logprob_gap/image/kl").counted_by == "logprob_gap/image/tokens"
    assert describe("perception/expert_load/11").counted_by is None
    assert describe("seconds/weight_sync").meaning


@pytest.mark.parametrize(
    "name", ["accuracy", "neither/accuracy", "perception/accurracy", "probe/probe/step", "policy_grad_norm2", ""]
)
def test_a_misspelt_name_is_an_error(name: str) -> None:
    with pytest.raises(UnknownMetricError, match=r"observability/catalogue\.py"):
        describe(name)


def test_no_name_has_two_entries_and_every_count_has_one() -> None:
    patterns = [name for entries in METRICS.values() for name in entries]
    assert len(patterns) == len(set(patterns))
    for entries in METRICS.values():
        for metric in entries.values():
            assert metric.counted_by is None or metric.counted_by in patterns


def test_a_figure_without_a_count_is_not_pooled() -> None:
    with pytest.raises(ValueError, match="policy_grad_norm has no count"):
        pooled([{"policy_grad_norm": 1.0}], "policy_grad_norm")


def test_the_page_is_that_of_the_catalogue() -> None:
    """Write it anew by ``python -m prism_megatron.observability.catalogue > docs/metrics.md``."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert text == page()
    assert set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)) == {n for one in METRICS.values() for n in one}
