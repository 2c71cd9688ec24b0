"""Records: every malformed line is refused by file, line and field; nothing outside the folder is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.data.records import Record, id_group, in_part, read_records
from prism_megatron.errors import DataError

GOOD: dict[str, Any] = {
    "id": "set-1",
    "image": "images/1.png",
    "question": "Which?",
    "choices": ["C", "two"],
    "answer": "B",
    "answer_type": "choice",
    "solution": "It is two.",
    "caption": "A picture.",
    "source": "set/dev",
}
OPEN = {"choices": None, "answer_type": "integer", "answer": "-3"}


def make_set(folder: Path, *lines: dict[str, Any] | str) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 32)).save(folder / "images" / "1.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "data.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def test_a_good_record(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", GOOD, {**GOOD, **OPEN, "id": "set-2", "solution": None, "question": "a\u2028b"})
    first, second = read_records(folder, purpose="train")
    assert first.question_text == "Which?\nA. C\nB. two"
    assert (first.caption, first.solution, first.answer) == ("A picture.", "It is two.", "B")
    assert second.solution is None and second.question_text == "a\u2028b"
    assert first.image == (folder / "images" / "1.png").resolve()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": 3}, "id"),
        ({"question": "  "}, "question"),
        ({"question": "\ud800"}, "question"),
        ({"question": "half \udfff"}, "question"),
        ({"solution": ""}, "solution"),
        ({"caption": ["x"]}, "caption"),
        ({"choices": "yes"}, "choices"),
        ({"choices": ["one"]}, "choices"),
        ({"choices": ["one", None]}, "choices"),
        ({"choices": None}, "choices"),
        ({"answer": "C"}, "answer"),
        ({"answer": "two"}, "answer"),
        ({**OPEN, "answer": "3.5"}, "answer"),
        ({**OPEN, "answer": "\u0663"}, "answer"),
        ({**OPEN, "answer_type": "float", "answer": "nan"}, "answer"),
        ({**OPEN, "answer_type": "bool", "answer": "True"}, "answer"),
        ({"answer_type": "number"}, "answer_type"),
        ({"extra": 1}, "extra"),
        ({"image": "images/none.png"}, "image"),
        ({"image": "/etc/hostname"}, "image"),
        ({"image": "images/../../outside.png"}, "image"),
        ({"image": "images/link.png"}, "image"),
        ({"image": "images/loop.png"}, "image"),
        ({"image": "images"}, "image"),
        ({"image": "images/1.png\0"}, "image"),
    ],
)
def test_a_malformed_field_is_named(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", GOOD, {**GOOD, "id": "set-2", **change})
    shutil.copy(folder / "images" / "1.png", tmp_path / "outside.png")
    (folder / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "images" / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=rf"data\.jsonl:2: field {field}: "):
        read_records(folder, purpose="train")


@pytest.mark.parametrize("line", ["{", "[1]", "null", '{"id": 1}', "[" * 100_000])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:2: "):
        read_records(make_set(tmp_path / "set", GOOD, line), purpose="train")


def test_missing_fields_repeated_ids_and_empty_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: field caption: missing"):
        read_records(make_set(tmp_path / "a", {k: v for k, v in GOOD.items() if k != "caption"}), purpose="train")
    with pytest.raises(DataError, match=r"data\.jsonl:2: field id: 'set-1' was used before, in line 1"):
        read_records(make_set(tmp_path / "b", GOOD, GOOD), purpose="train")
    with pytest.raises(DataError, match="holds no records"):
        read_records(make_set(tmp_path / "c", ""), purpose="train")
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "nowhere", purpose="train")


def test_evaluation_sets_are_refused_for_training(tmp_path: Path) -> None:
    """Claim: by folder name, by sets.json, by source, and through a link; reading them for evaluation works."""
    named = make_set(tmp_path / "mathvision_testmini", GOOD)
    (tmp_path / "link").symlink_to(named)
    marked = make_set(tmp_path / "marked", GOOD)
    copied = make_set(tmp_path / "copied", {**GOOD, "source": "mathvision/testmini"})
    (tmp_path / "sets.json").write_text(json.dumps({"marked": {"evaluation_only": True}}))
    for folder in (named, tmp_path / "link", marked, copied):
        with pytest.raises(DataError, match="evaluation only"):
            read_records(folder, purpose="train")
        assert len(read_records(folder, purpose="evaluate")) == 1


def record(id: str, source: str) -> Record:  # noqa: A002 the field's name
    return Record(id, Path("x"), "q", None, "1", None, None, source)


def test_parts_are_disjoint_and_keep_groups_together() -> None:
    """Claim: NLVR items of one sentence share a part; about a tenth is validation; file order plays no role."""
    assert id_group(record("nlvr-dev-2262-0", "nlvr/dev")) == id_group(record("nlvr-dev-2262-3", "nlvr/dev"))
    assert id_group(record("tabmwp-dev1k-1", "tabmwp/dev1k")) != id_group(record("tabmwp-dev1k-2", "tabmwp/dev1k"))
    records = [record(f"nlvr-dev-{i}-{j}", "nlvr/dev") for i in range(500) for j in range(3)]
    validation = [r for r in records if in_part(r, "validation", validation_share=0.1)]
    assert all(in_part(r, "train", validation_share=0.1) == (r not in validation) for r in records[:300])
    assert 0.06 < len(validation) / len(records) < 0.14
    assert len({id_group(r) for r in validation}) * 3 == len(validation)
