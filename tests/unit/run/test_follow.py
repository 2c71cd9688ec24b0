"""Rows are shown as they come: once each, whole, and again where a run goes on from an earlier step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.errors import DataError
from prism_megatron.observability.metrics import MetricsWriter, Row
from prism_megatron.run.follow import RowClock, RowReader, follow


def steps(rows: Any) -> list[int]:
    return [row["step"] for row in rows]


def write(path: Path, first: int, last: int, mark: str) -> None:
    writer = MetricsWriter(path, first_step=first)
    for step in range(first, last):
        writer.write({"step": step, "mark": mark})
    writer.close()


def test_every_row_comes_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = RowReader(path)
    assert steps(reader.news().rows) == []
    write(path, 0, 2, "a")
    assert steps(reader.news().rows) == [0, 1]
    assert steps(reader.news().rows) == []
    with path.open("a") as file:
        file.write(json.dumps({"step": 2}) + "\n")
    assert steps(reader.news().rows) == [2]


def test_a_line_that_is_half_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = RowReader(path)
    path.write_text('{"step": 0}\n{"st')
    assert steps(reader.news().rows) == [0]
    assert steps(reader.news().rows) == []
    with path.open("a") as file:
        file.write('ep": 1}\n')
    assert steps(reader.news().rows) == [1]


def test_a_run_that_goes_on_from_an_earlier_step_is_followed_from_there(tmp_path: Path) -> None:
    """Claim: rows that are the same are not shown again, whether or not the new file has already outgrown the old."""
    for played_again in (3, 9):
        path = tmp_path / f"{played_again}.jsonl"
        reader = RowReader(path)
        write(path, 0, 5, "a")
        assert steps(reader.news().rows) == [0, 1, 2, 3, 4]
        write(path, 2, played_again, "b")
        news = reader.news()
        assert news.after == 2
        assert steps(news.rows) == list(range(2, played_again))
        assert reader.news().after is None


def test_a_file_that_was_cut_where_it_lies_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = RowReader(path)
    write(path, 0, 3, "a")
    reader.news()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    news = reader.news()
    assert (news.after, steps(news.rows)) == (1, [])


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not JSON"):
        RowReader(path).news()


def test_a_run_is_followed_to_its_end(tmp_path: Path) -> None:
    """The run plays some steps at every look, goes back once, and ends; what came before the end is shown too."""
    path = tmp_path / "metrics.jsonl"
    looks: list[int] = []
    shown: list[Row] = []
    said: list[str] = []
    script = [(0, 2), (2, 4), (3, 6)]

    def wait() -> None:
        looks.append(len(shown))
        write(path, *script.pop(0), mark=str(len(script)))

    follow(
        RowReader(path), show=shown.append, say=said.append, ended=lambda: None if script else "all played", wait=wait
    )
    assert steps(shown) == [0, 1, 2, 3, 3, 4, 5]
    assert looks == [0, 2, 4]
    assert said == [
        "the run goes on after step 2",  # another file is there, which drops nothing
        "the run goes on after step 3: 1 row is dropped, and its step is played again",
        "the run has ended after 6 steps: all played",
    ]


def test_the_clock_is_that_of_the_rows() -> None:
    clock = RowClock()
    clock.move_to({"step": 0, "time": "2026-11-28T22:58:29Z"})
    start = clock()
    clock.move_to({"step": 1, "time": "2026-11-28T22:59:29Z"})
    assert clock() - start == 60.0
    clock.move_to({"step": 2, "seconds/a": 1.5, "seconds/b": 2.0})
    assert clock() - start == 63.5
