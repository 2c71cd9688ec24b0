"""What run.json holds comes back, and what is damaged is one line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.errors import DataError
from prism_megatron.run.record import RunRecord, read_record, write_record

RECORD = RunRecord(
    id="0f" * 16,
    stage="align",
    title="Alignment of \u202ea model",
    created="2026-11-28T22:58:29Z",
    total_steps=500,
    world_size=8,
    layout={"tp": 4, "pp": 2},
    versions={"torch": "2.13.0"},
    data={"lines": 9, "kept": 5, "no_caption": 4},
)


def test_a_record_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert read_record(path) is None
    write_record(path, RECORD)
    assert read_record(path) == RECORD
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"id": 7},
        {"stage": None},
        {"world_size": True},
        {"layout": []},
        {"layout": {"tp": "4"}},
        {"versions": "2"},
        {"data": {"kept": "5"}},
        {"data": [1]},
    ],
)
def test_a_field_of_another_kind_is_told(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(asdict(RECORD) | change), encoding="utf-8")
    with pytest.raises(DataError, match=rf"run\.json is damaged \({next(iter(change))} is "):
        read_record(path)


def test_a_record_of_an_earlier_version_says_nothing_of_its_data(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({name: value for name, value in asdict(RECORD).items() if name != "data"}))
    assert read_record(path) == replace(RECORD, data={})


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "{}", "\udcff"])
def test_what_is_no_record_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="is damaged"):
        read_record(path)
