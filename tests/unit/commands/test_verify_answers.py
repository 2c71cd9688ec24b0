"""``prism-verify-answers``: a verdict a line, in the order of the file, and one error for a bad line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron.commands.verify_answers import main
from tests.conftest import REPOSITORY

LINES = [
    {"id": "a", "answer": "0.5", "gold": "1/2"},
    {"id": "b", "answer": r"\sqrt{8}", "gold": r"2\sqrt{2}", "answer_type": "text"},
    {"id": "c", "answer": "9^{9^{9^9}}", "gold": r"\sqrt{2}", "answer_type": None},
    {"id": "d", "answer": "", "gold": "B", "answer_type": "choice"},
    {"id": "a", "answer": "b", "gold": "B", "answer_type": "choice"},
]


def written(folder: Path, lines: list[object]) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_line_each_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: verdicts in order, equal ids kept apart, whatever needs a worker; what concerns all goes to stderr."""
    path = written(tmp_path, [*LINES * 100, {"id": "last", "answer": "7", "gold": "7:3"}])
    assert main([str(path)]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d", "a"] * 100 + ["last"]
    assert [row["verdict"] for row in rows] == [True, True, False, False, True] * 100 + [False]
    assert [row["kind"] for row in rows] == ["number", "latex", "latex", "letters", "letters"] * 100 + ["ratio"]
    assert all(0 <= row["seconds"] < 1 for row in rows)
    assert [row.get("reason") for row in rows[:3]] == [None, None, "guarded: a tower of powers"]
    (summary,) = said.err.splitlines()
    assert summary.startswith("501 answers in ")
    assert summary.endswith("300 right, 201 wrong, of which 200 were guarded and 0 ended by a limit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object, but a list"),
        ('{"id": "x", "id": "y", "answer": "1", "gold": "1"}', "key 'id' stands twice"),
        ('{"id": "x", "answer": NaN, "gold": "1"}', "NaN is no JSON"),
        ({"id": "x", "answer": "1"}, "field gold: missing"),
        ({"id": "x", "answer": "1", "gold": "1", "a": 1}, "the fields are id, answer, gold, answer_type"),
        ({"id": "x", "answer": 1, "gold": "1"}, "field answer: text expected, and it is a number; put it in quotes"),
        ({"id": 7, "answer": "1", "gold": "1"}, "field id: text expected"),
        ({"id": "x", "answer": "1", "gold": " "}, "field gold: text that is not empty expected"),
        ({"id": "x", "answer": "1", "gold": "x" * 2000}, "field gold: 1024 characters or more"),
        ({"id": "x", "answer": "1", "gold": "1", "answer_type": "letter"}, "field answer_type: choice, integer, float"),
    ],
)  # fmt: skip
def test_a_bad_line_is_one_error_that_names_it(
    line: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, [LINES[0], line])
    assert main([str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {path}:2: ")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_a_missing_file_and_a_bad_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.jsonl")]) == 2
    assert "is no file" in capsys.readouterr().err
    assert main([str(written(tmp_path, list(LINES))), "--workers", "0"]) == 2
    assert capsys.readouterr().err == "error: --workers 0 must be at least 1\n"


def test_the_tool_of_a_checkout(tmp_path: Path) -> None:
    path = written(tmp_path, list(LINES))
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "verify_answers.py"), str(path)],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert [json.loads(line)["verdict"] for line in done.stdout.splitlines()] == [True, True, False, False, True]
