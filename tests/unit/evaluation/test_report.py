"""The page stands alone, shows what it was given, and what a model wrote cannot act in it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.evaluation.charts import line_chart
from prism_megatron.evaluation.game_summary import game_summary
from prism_megatron.evaluation.report import write_report
from prism_megatron.evaluation.sample import Sample, png_url
from prism_megatron.observability.summary import RunFacts, summarise
from prism_megatron.stages.align.view import VIEW as ALIGN
from prism_megatron.stages.warm_start.view import VIEW as WARM_START

HOSTILE = "</pre><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\u202edesrever\x00\ud800 ok"


class Page(HTMLParser):
    """All tags with attributes, and all text, as a browser would see them."""

    VOID = ("meta", "img", "line", "circle", "path", "text", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "policy_version": step,
        "rollouts": 4,
        "valid_rollouts": 4,
        "valid_share": 1.0,
        "response_tokens": 80,
        "perception/pairs": 4,
        "perception/accuracy": 0.5,
        "perception/reward_gap": 1.25,
        "reasoning/pairs": 0,
        "reasoning/accuracy": None,
        "reasoning/reward_gap": None,
        "seconds/rollout": 0.4,
    }


def page_of(tmp_path: Path, *samples: Sample, steps: int = 3) -> Page:
    rows = [row(step) for step in range(steps)]
    facts = RunFacts(
        world_size=2, layout={"tp": 2, "pp": 1, "cp": 1, "dp": 1, "ep": 1}, hf_export="a<b>", checkpoint=None,
        megatron_core="0.16.1", torch="2.13", other_seconds={},
    )  # fmt: skip
    path = tmp_path / "report.html"
    summary = {**summarise(rows, facts), **game_summary(rows)}
    write_report(path, title="Alignment & more", view=ALIGN, rows=rows, summary=summary, samples=samples)
    return Page(path.read_text(encoding="utf-8"))


def sample(response: str = "fine", side: int = 96) -> Sample:
    image = Image.new("RGB", (side, side // 2), (200, 30, 30))
    return Sample(
        [png_url(image)], "How many?", response, "the reference", None, {"perception": 1.5, "reasoning": None}
    )


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, sample(HOSTILE))
    assert not {"script", "iframe", "object", "a", "link"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert not re.search("[\u202e\x00\ud800]", page.text)
    assert "a<b>" in page.text


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = page_of(tmp_path, sample())
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all((link or "").startswith("data:image/png;base64,") for link in links)
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_sample_images_are_real_and_small(tmp_path: Path) -> None:
    page = page_of(tmp_path, sample(side=2000), sample())
    sizes = []
    for tag, attributes in page.tags:
        if tag == "img":
            data = base64.b64decode((attributes["src"] or "").split(",")[1])
            sizes.append(Image.open(io.BytesIO(data)).size)
    assert sizes == [(320, 160), (96, 48)]


def test_figures_and_missing_data_are_told_apart(tmp_path: Path) -> None:
    page = page_of(tmp_path, sample())
    assert "+1.25" in page.text
    assert "scores: perception +1.50, reasoning –" in page.text
    assert "3 steps on 2 ranks (TP2 · PP1 · CP1 · DP1 · EP1)" in page.text


def test_long_responses_are_cut_and_say_so(tmp_path: Path) -> None:
    assert "(4,000 more characters)" in page_of(tmp_path, sample("x" * 10_000)).text


def test_a_line_has_a_gap_where_data_is_missing_and_a_dot_where_it_is_alone() -> None:
    figure = line_chart("t", {"a": [(0, 1.0), (1, 2.0), (2, None), (3, 3.0), (4, float("nan")), (5, 1.0), (6, 0.0)]})
    (path,) = re.findall("<path d='([^']*)'", figure)
    assert path.count("M") == 3
    assert path.count("L") == 2
    assert figure.count("<circle") == 1


def test_points_lie_where_the_axes_say() -> None:
    """y ticks and the line share one scale: the line's ends at 0 and 100 stand on those grid lines."""
    figure = line_chart("t", {"a": [(0, 0.0), (10, 100.0)]})
    grid = [float(y) for y in re.findall("class='grid' .*?y1='([0-9.]+)'", figure)]
    start, end = re.findall(r"[ML][0-9.]+ ([0-9.]+)", figure)
    assert (float(start), float(end)) == (grid[0], grid[-1])
    assert re.findall(">([0-9]+)</text>", figure)[:5] == ["0", "50", "100", "0", "5"]


@pytest.mark.parametrize("points", [[], [(0, None)], [(3, 2.0)], [(0, 5.0), (1, 5.0)], [(0, -1e12), (1, 1e12)]])
def test_every_set_of_points_makes_a_figure_and_no_points_make_none(points: list[tuple[float, float | None]]) -> None:
    figure = line_chart("t", {"a": points})
    assert "nan" not in figure
    assert figure.startswith("<figure>") == any(y is not None for _, y in points)
    assert (figure == "") == all(y is None for _, y in points)


def test_health_of_the_game_is_shown_per_tower_where_there_is_any(tmp_path: Path) -> None:
    """Claim: AUC, length, spread, agreement and the probe set have figures; what no row has, has no chart."""
    health = {
        "perception/auc": 0.75,
        "perception/auc_pairs": 8,
        "perception/length_correlation": -0.5,
        "perception/length_correlation_count": 4,
        "perception/reference_std": 1.0,
        "tower_agreement": 0.25,
        "tower_agreement_groups": 2,
        "rolled_back": 1,
        "probe/discriminator_loss": 0.5,
        "probe/perception/reward_gap": 2.0,
        "perception/expert_entropy": 0.9,
    }
    facts = RunFacts(world_size=1, layout={"tp": 1}, hf_export=None, checkpoint=None, megatron_core="0.16.1",
                     torch="2.13", other_seconds={})  # fmt: skip
    pages = []
    for extra in (health, {}):
        rows = [{**row(step), **extra} for step in range(2)]
        summary = {**summarise(rows, facts), **game_summary(rows)}
        assert summary["auc"] == {"perception": extra.get("perception/auc"), "reasoning": None}
        assert summary["tower_agreement"] == extra.get("tower_agreement")
        assert summary["rollbacks"] == (2 if extra else 0)
        write_report(tmp_path / "report.html", title="t", view=ALIGN, rows=rows, summary=summary, samples=[])
        pages.append(Page((tmp_path / "report.html").read_text(encoding="utf-8")).text)
    shown, without = pages
    assert "0.75 of 16" in shown
    assert "-0.50" in shown
    for title in ("(AUC)", "Probe set: reward gap", "Evenness of the experts' load", "Spread of scores"):
        assert title in shown
        assert title not in without
    assert "Discriminator accuracy" in without
    assert "–" in without


def test_a_warm_start_has_a_report_with_its_held_out_pairs(tmp_path: Path) -> None:
    """Claim: what only alignment has is not on the page; the export is called what the summary calls it."""
    rows = [row(step) for step in range(2)]
    facts = RunFacts(world_size=1, layout={"tp": 1}, hf_export="run/hf", checkpoint=None, megatron_core="0.16.1",
                     torch="2.13", other_seconds={})  # fmt: skip
    held_out = {"perception/accuracy": 0.875, "perception/auc": None, "reasoning/accuracy": 0.625, "reasoning/auc": 0.5}
    summary = {**summarise(rows, facts), **game_summary(rows), "held_out": held_out}
    pages = []
    for more in ({}, {"exported": "Discriminator <b>"}):
        write_report(tmp_path / "w.html", title="t", view=WARM_START, rows=rows, summary=summary | more, samples=[])
        pages.append(Page((tmp_path / "w.html").read_text(encoding="utf-8")).text)
    assert "Held out" in pages[0]
    assert "0.88" in pages[0]
    assert "Rollbacks" not in pages[0]
    assert "Sample rollouts" not in pages[0]
    assert "Exportrun/hf" in pages[0]
    assert "Discriminator <b>run/hf" in pages[1]
