"""Every form in which responses are stored is read, and what is malformed is one error that names its line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.data.segments import response_text
from prism_megatron.errors import DataError
from prism_megatron.evaluation.drift.responses import read_responses

WHOLE = response_text("- a cat", "one cat", "1")
PARTS = {"caption": "- a cat", "reasoning": "one cat", "answer": "1", "whole": WHOLE}
ANSWER = {
    "set": "s", "id": "1", "digest": "d", "mode": "greedy", "sample": 0, "counts": True, "right": True, "valid": True,
    "truncated": False, "tokens": 9, "kind": "number", "answer": "1", "problem": "", "text": WHOLE, "failure": "",
}  # fmt: skip


def written(folder: Path, *lines: object) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))
    return path


def parts(**fields: Any) -> Mapping[str, Any]:
    return {"id": "1", "caption": "- a cat", "answer": "1", **fields}


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ({"id": "1", "response": WHOLE}, PARTS),
        ({"id": "1", "response": "one cat"}, {"whole": "one cat"}),
        (parts(think="one cat"), PARTS),
        (parts(solution="one cat", image="x.png", choices=None), PARTS),
        (parts(solution=None), {"caption": "- a cat", "answer": "1"}),
        (ANSWER, PARTS),
    ],
)
def test_forms_of_a_line(line: Mapping[str, Any], texts: Mapping[str, str], tmp_path: Path) -> None:
    """A response with its tags, one without, bodies apart, a record, one without reasoning, an evaluation's answer."""
    found = read_responses("a", written(tmp_path, line), mode="greedy")
    assert found.texts == {"1": texts}
    assert (found.not_in_form, found.left_out) == ("caption" not in texts, 0)


def test_the_first_answer_of_the_mode_stands_for_a_question(tmp_path: Path) -> None:
    """Claim: one response a question, of the mode that is asked for; failures are left out, and all are counted."""
    lines = [
        ANSWER,
        ANSWER | {"mode": "sampled", "text": "first"},
        ANSWER | {"mode": "sampled", "text": "second", "sample": 1},
        ANSWER | {"id": "2", "failure": "too long", "text": ""},
        ANSWER | {"id": "2", "mode": "sampled", "text": "third"},
    ]
    path = written(tmp_path, *lines)
    greedy, sampled = (read_responses("a", path, mode=mode) for mode in ("greedy", "sampled"))
    assert {key: one["whole"] for key, one in greedy.texts.items()} == {"1": WHOLE}
    assert {key: one["whole"] for key, one in sampled.texts.items()} == {"1": "first", "2": "third"}
    assert (greedy.left_out, sampled.left_out) == (4, 3)
    assert (greedy.not_in_form, sampled.not_in_form) == (0, 2)
    assert greedy.of_segment("caption") == {"1": "- a cat"} and sampled.of_segment("caption") == {}


def test_equal_ids_of_two_sets_are_two_questions(tmp_path: Path) -> None:
    found = read_responses("a", written(tmp_path, ANSWER, ANSWER | {"set": "t"}), mode="greedy")
    assert set(found.texts) == {"s/1", "t/1"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object, but a list"),
        ('{"id": "x", "id": "y", "response": "1"}', "key 'id' stands twice"),
        ({"response": "1"}, "field id: missing"),
        ({"id": 7, "response": "1"}, "field id: text expected, and it is a number"),
        ({"id": "x", "response": None}, "field response: text expected, and it is null"),
        ({"id": "x", "caption": 1}, "field caption: text expected, and it is a number"),
        ({"id": "x", "question": "1"}, "nothing to compare; a line has id with response"),
    ],
)
def test_a_bad_line_is_named(line: object, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"id": "a", "response": "b"}, line)
    with pytest.raises(DataError) as error:
        read_responses("a", path, mode="greedy")
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no responses to compare \(of 1 lines\); see --mode"):
        read_responses("a", written(tmp_path, ANSWER), mode="sampled")
