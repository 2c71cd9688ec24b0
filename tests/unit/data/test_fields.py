"""What is said of a value of a wrong type: which type it is, and what to do; and of files of other encodings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.data.pairs import read_pairs
from prism_megatron.data.reading.fields import check_text
from prism_megatron.data.records import read_records
from prism_megatron.errors import DataError
from tests.timing import processor_seconds
from tests.unit.data.test_pairs import GOOD as PAIR
from tests.unit.data.test_pairs import make_file
from tests.unit.data.test_records import GOOD as RECORD
from tests.unit.data.test_records import make_set


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (
            "image",
            ["images/1.png"],
            "text expected, and it is a list; a record has one image, so give the path of one file",
        ),
        ("image", {"path": "images/1.png"}, "text expected, and it is an object; give the path of its file alone"),
        ("image", None, "text expected, and it is null; fill it in, or leave the line out"),
        ("question", ["a", "b"], "text expected, and it is a list; give one text"),
        ("question", {"text": "a"}, "text expected, and it is an object; give its text alone"),
        ("question", " ", "text that is not empty expected, and it is blank; fill it in, or leave the line out"),
        ("id", 3, "text expected, and it is a number; put it in quotes"),
        ("answer", 3.5, "text expected, and it is a number; put it in quotes"),
        ("answer", True, "text expected, and it is true or false; put it in quotes"),
        ("caption", ["x"], "text or null expected, and it is a list; give one text"),
        ("solution", "", "text that is not empty expected, and it is blank; fill it in, or write null"),
        ("choices", "a, b", "a list of 2 to 26 texts or null expected, and it is text"),
        ("choices", ["a"], "a list of 2 to 26 texts or null expected, and it is a list of 1"),
        ("choices", ["a"] * 27, "a list of 2 to 26 texts or null expected, and it is a list of 27"),
        ("choices", ["a", 2], "text expected, and it is a number; put it in quotes"),
        ("choices", ["a", ["b"]], "text expected, and it is a list; give one text"),
    ],
)
def test_a_record_is_told_the_type_it_has(field: str, value: Any, said: str, tmp_path: Path) -> None:
    folder = make_set(tmp_path, {**RECORD, field: value})
    with pytest.raises(DataError) as caught:
        read_records(folder, purpose="train")
    assert str(caught.value) == f"{tmp_path.resolve()}/data.jsonl:1: field {field}: {said}"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rejected", "a", "a list of at least one response expected, and it is text"),
        ("rejected", [], "a list of at least one response expected, and it is a list of 0"),
        ("rejected", [None], "text expected, and it is null; fill it in, or leave the line out"),
        ("chosen", ["a"], "text expected, and it is a list; give one text"),
    ],
)
def test_a_pair_is_told_the_type_it_has(field: str, value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_pairs(make_file(tmp_path, {**PAIR, field: value}))
    assert str(caught.value) == f"{tmp_path.resolve()}/pairs.jsonl:1: field {field}: {said}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "not a JSON object, but a list; write one object to a line"),
        ("null", "not a JSON object, but null"),
        ('"a"', "not a JSON object, but text"),
        ('{"id": "a", "id": "b"}', "not a JSON object: key 'id' stands twice in one object; leave one of them out"),
        ('{"id": NaN}', "not a JSON object: NaN is no JSON"),
    ],
)
def test_a_line_is_told_what_it_is(line: str, said: str, tmp_path: Path) -> None:
    for read in (
        lambda: read_records(make_set(tmp_path, RECORD, line), purpose="train"),
        lambda: read_pairs(make_file(tmp_path, PAIR, line)),
    ):
        with pytest.raises(DataError) as caught:
            read()
        assert f".jsonl:2: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "data.jsonl:1: the file is encoded in UTF-16; save it as UTF-8"),
        ("utf-16-le", "data.jsonl:1: the file is encoded in UTF-16-LE; save it as UTF-8"),
        ("utf-32", "data.jsonl:1: the file is encoded in UTF-32; save it as UTF-8"),
        ("utf-8-sig", "data.jsonl:1: the file is encoded in UTF-8 with a byte order mark"),
        ("latin-1", "data.jsonl:2: not a JSON object: byte 0xe9 at position "),
    ],
)
def test_a_file_of_another_encoding_is_told_which(encoding: str, said: str, tmp_path: Path) -> None:
    lines = [json.dumps(RECORD), json.dumps({**RECORD, "id": "café"}, ensure_ascii=False)]
    folder = make_set(tmp_path, RECORD)
    (folder / "data.jsonl").write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(DataError) as caught:
        read_records(folder, purpose="train")
    assert said in str(caught.value) and "UTF-8" in str(caught.value) and "\n" not in str(caught.value)


def test_the_list_of_sets_may_not_say_a_thing_twice(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", RECORD)
    (tmp_path / "sets.json").write_text('{"set": {"evaluation_only": true}, "set": {}}')
    with pytest.raises(DataError, match=r"sets\.json: .*key 'set' stands twice"):
        read_records(folder, purpose="train")


@pytest.mark.parametrize("letter", ["a", "é", "多", "🧿"])
def test_half_a_pair_is_found_anywhere_in_a_long_text_in_no_time(letter: str) -> None:
    """Claim: at the end of ten million letters too; a look at each of them by itself would take a second and more."""
    text = letter * 10_000_000

    def look() -> None:
        check_text(text, "answer", "here")
        with pytest.raises(DataError, match="here: field answer: holds half of a surrogate pair"):
            check_text(f"{text}\udfff", "answer", "here")

    assert processor_seconds(look, enough=0.5) < 0.5
    for half in ("\ud800", "\udbff", "\udc00", "\udfff"):
        with pytest.raises(DataError, match="holds half of a surrogate pair"):
            check_text(f"a{half}b", "answer", "here")
