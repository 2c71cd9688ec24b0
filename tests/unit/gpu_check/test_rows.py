"""Verdicts of figures, and what is printed and written of them."""

from __future__ import annotations

import json
import math

import pytest

from prism_megatron.gpu_check.rows import Row, document, failed, lines, measured, skipped, within


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"),
    [
        (1.0, False, "holds"),
        (1.5, False, "FAILS"),
        (math.nan, False, "FAILS"),
        (1.0, True, "holds"),
        (0.5, True, "FAILS"),
        (math.nan, True, "FAILS"),
    ],
)
def test_a_figure_at_its_limit_holds_and_one_that_is_no_number_never_does(
    value: float, at_least: bool, verdict: str
) -> None:
    """Claim: a limit is the last figure that is good, from either side."""
    assert within("error", value, 1.0, at_least=at_least).verdict == verdict


def test_the_table_names_what_was_skipped_and_why() -> None:
    """Claim: every row is a line, with its limit, its unit and its reason."""
    found = {
        "head": [within("apart", 0.002, 0.01, "nats", note="fp32"), measured("time", 12.0, "ms")],
        "parity": [skipped("FP8", "Transformer Engine is not installed"), failed("the rest", "SIGABRT")],
    }
    header, *rows = lines(found)
    assert header.split() == ["check", "what", "figure", "limit", "verdict", "note"]
    assert [" ".join(row.split()) for row in rows] == [
        "head apart 0.002 nats <= 0.01 nats holds fp32",
        "head time 12 ms measured",
        "parity FP8 skipped Transformer Engine is not installed",
        "parity the rest FAILS SIGABRT",
    ]


def test_the_document_is_json_whatever_was_measured() -> None:
    """Claim: figures that are no numbers are null in it; all else is as in the rows."""
    text = document({"device": "some GPU"}, {"head": [within("apart", math.inf, 1.0), Row("x", "measured", 2.0)]})
    read = json.loads(text)
    assert read["machine"] == {"device": "some GPU"}
    apart, other = read["checks"]["head"]
    assert (apart["value"], apart["limit"], apart["verdict"]) == (None, 1.0, "FAILS")
    assert (other["what"], other["value"], other["limit"]) == ("x", 2.0, None)
