"""The page of an evaluation: nothing that a model, a set or an endpoint wrote becomes markup.

Blind spot: how it looks.
"""

from __future__ import annotations

from pathlib import Path

from prism_megatron.evaluation.benchmark.answers import Item
from prism_megatron.evaluation.benchmark.metrics import summary_of
from prism_megatron.evaluation.benchmark.page import Shown, write_evaluation_page
from prism_megatron.evaluation.benchmark.paired import RULE, compare
from tests.unit.evaluation.benchmark.lines import line

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"&\u202e\ud800"


def page(tmp_path: Path) -> str:
    answers = [
        [line(HOSTILE, of=HOSTILE, text=HOSTILE, answer=HOSTILE, digest="d")],
        [line("q-1", failure=HOSTILE)],
        [line("q-2", right=True, valid=False)],
    ]
    items = [
        Item(HOSTILE, HOSTILE, "d", kind=HOSTILE, source=HOSTILE, difficulty=HOSTILE),
        Item("made", "q-1", "d", kind="choice", source="made"),
        Item("made", "q-2", "d", kind="choice", source="made"),
    ]
    summary = summary_of(items, answers)
    summary["against"] = {"folder": HOSTILE, "notes": [HOSTILE]}
    shown = [Shown("data:image/png;base64,AAAA", HOSTILE, HOSTILE, own) for own in answers]
    paired = [compare(HOSTILE, [1.0, 0.0], [0.0, 0.0])]
    path = tmp_path / "report.html"
    write_evaluation_page(path, summary, shown, paired, title=HOSTILE, lead=HOSTILE)
    return path.read_text(encoding="utf-8")


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    text = page(tmp_path)
    # Markup without quotes would be read as such: neither tag is there in any spelling.
    assert "<script" not in text and "<img src=x" not in text and "onerror='" not in text
    assert "\u202e" not in text and "\ufffd" in text
    # Of every place that was filled: title twice, lead, group names, questions, golds, answers, failures, comparison.
    assert text.count("&lt;script&gt;") >= 12
    assert "default-src 'none'" in text


def test_what_the_page_says(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "1 of 3 answers failed, and count as wrong" in text
    assert "greedy: right, in another form; &lt;think&gt; appears 0 times" in text
    assert "greedy: wrong; failed: " in text
    assert RULE.split(";", maxsplit=1)[0][:40] in text
    assert "data:image/png;base64,AAAA" in text
