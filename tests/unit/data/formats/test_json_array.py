"""Elements of an array are found where json finds them, whatever the blocks that the file is read in."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.data.formats.files import json_array
from prism_megatron.data.formats.files.json_array import array_places
from prism_megatron.errors import DataError
from tests.conftest import SEED


def found(path: Path) -> list[Any]:
    data = path.read_bytes()
    places = list(array_places(path))
    assert [place.number for place in places] == list(range(1, len(places) + 1))
    return [json.loads(data[place.offset : place.offset + place.size]) for place in places]


def value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6 if depth < 3 else 3)
    if kind > 3:
        return {f"k{i}": value(draw, depth + 1) for i in range(draw.randrange(4))}
    if kind == 3:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return draw.choice((None, True, -1.5e3, 7, "", 'a"b\\', "[{,}]", "\\", "é\u2028", "x" * draw.randrange(90)))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 2**20])
def test_elements_are_those_of_json(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blind spot: documents that these draws do not come to."""
    monkeypatch.setattr(json_array, "_BLOCK_BYTES", block)
    draw, path = random.Random(SEED + block), tmp_path / "a.json"
    for case in range(40):
        document = [value(draw) for _ in range(draw.randrange(6))]
        text = json.dumps(document, indent=draw.choice((None, 2)), ensure_ascii=draw.random() < 0.5)
        path.write_bytes((b"\xef\xbb\xbf" if case % 5 == 0 else b"") + f" \n{text}\n ".encode())
        assert found(path) == document, text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the array is not closed"),
        ('{"a": 1}\n{"b": 2}', "must end in .jsonl"),
        ('[{"a": 1} {"b": 2}]', "malformed at byte 10"),
        ("[,{}]", "malformed at byte 1"),
        ("[{},]", "malformed at byte 4"),
        ("[{},,{}]", "malformed at byte 4"),
        ("[{}] x", "malformed at byte 5"),
        ("[{}}", "malformed at byte 3"),
        ('[{"a": 1}, {"b"', "the array is not closed"),
        ('[{"a": "\\', "the array is not closed"),
        ('["', "the array is not closed"),
        ("[{}", "the array is not closed"),
    ],
)
def test_a_broken_array_is_named(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"a\.json: ") as caught:
        list(array_places(path))
    assert problem in str(caught.value)


def test_elements_before_a_cut_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"b": 2}, {"c"')
    places = array_places(path)
    assert [next(places).offset, next(places).offset] == [1, 11]
    with pytest.raises(DataError, match="not closed"):
        next(places)
