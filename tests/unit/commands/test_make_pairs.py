"""``prism-make-pairs``: a file that a warm-start reads, from references and whatever a student answered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prism_megatron.commands.make_pairs import main
from prism_megatron.data.pairs import read_pairs
from prism_megatron.data.segments import response_text
from tests.conftest import REPOSITORY

RIGHT = response_text("Two circles.", "I count two.", "2")
WRONG = response_text("Three circles.", "I count three.", "3")
OTHER = response_text("A circle.", "I count one.", "1")
RECORD: dict[str, Any] = {
    "id": "a", "image": "images/a.png", "question": "How many circles?", "choices": None, "answer": "2",
    "answer_type": "integer", "solution": "I count two.", "caption": "Two circles.", "source": "own/1",
}  # fmt: skip


def a_set(folder: Path, *records: dict[str, Any]) -> Path:
    (folder / "images").mkdir(parents=True)
    for number, one in enumerate(records):
        Image.new("RGB", (40, 30), (number % 2, 9, 9)).save(folder / one["image"])
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def a_file(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def made(data: Path, answers: Path, output: Path, *more: str) -> int:
    return main(["--data", str(data), "--answers", str(answers), "--output", str(output), *more])


def test_valid_answers_unlike_the_reference_become_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: references stand above answers in the file's order, and everything else is counted under its reason."""
    choices = {**RECORD, "id": "b", "image": "images/b.png", "choices": ["2", "3"], "answer": "A",
               "answer_type": "choice"}  # fmt: skip
    same_picture = {**RECORD, "id": "c", "image": "images/c.png"}
    no_caption = {**RECORD, "id": "d", "image": "images/d.png", "caption": None}
    broken = {**RECORD, "id": "e", "image": "images/e.png", "solution": "It is </think> done."}
    alone = {**RECORD, "id": "f", "image": "images/f.png"}
    data = a_set(tmp_path / "set", RECORD, choices, same_picture, no_caption, broken, alone)
    answers = a_file(
        tmp_path / "answers.jsonl",
        {"id": "b", "response": WRONG},
        {"id": "a", "response": WRONG},
        {"id": "a", "response": RIGHT.replace("\n", "  ")},  # like the reference but for white space
        {"id": "a", "response": f"\n{WRONG}  "},  # given before
        {"id": "a", "response": "3"},
        {"id": "a", "response": "<caption>x</caption>"},
        {"id": "a", "response": OTHER},
        {"id": "a", "response": response_text("x", "y", "z")},  # beyond --rejected
        {"id": "c", "response": OTHER, "more": [1, 2]},
        {"id": "c", "text": "", "failure": "time is over"},
        {"id": "d", "response": WRONG},
        {"id": "nobody", "response": WRONG},
    )
    assert made(data, answers, tmp_path / "pairs", "--rejected", "2") == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/pairs/pairs.jsonl: 3 of 6 records stand above 4 of 12 answers; records left out: 1 without a "
        "caption or a solution, 1 with a reference that is no valid response, 1 without an answer to reject; answers "
        "left out: 1 failed, 1 of no record, 1 of a record that is left out, 2 in no valid form, 1 like the reference, "
        "1 given before, 1 beyond --rejected\n"
    )
    first, second, third = read_pairs(tmp_path / "pairs" / "pairs.jsonl")
    assert (first.id, first.question, first.chosen, first.source) == ("a", "How many circles?", RIGHT, "own/1")
    assert first.rejected == (WRONG, OTHER)
    assert (second.id, second.question, second.rejected) == ("b", "How many circles?\nA. 2\nB. 3", (WRONG,))
    assert second.chosen == response_text("Two circles.", "I count two.", "A")
    assert third.rejected == (OTHER,)
    assert third.image == first.image != second.image
    assert len(list((tmp_path / "pairs" / "images").iterdir())) == 2
    assert first.image.read_bytes() == (data / "images" / "a.png").read_bytes()


def test_answers_of_an_evaluation_are_taken_of_its_own_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: the folder that prism-evaluate writes is read as it is; of several sets the one that is named counts."""
    data = a_set(tmp_path / "own", RECORD)
    line = {"digest": "0a", "mode": "greedy", "sample": 0, "counts": True, "right": True, "valid": True,
            "truncated": False, "tokens": 9, "kind": "number", "answer": "3", "problem": "", "failure": ""}  # fmt: skip
    a_file(
        tmp_path / "evaluated" / "answers.jsonl",
        {"set": "other", "id": "a", **line, "text": OTHER},
        {"set": "own", "id": "a", **line, "text": WRONG},
    )
    assert made(data, tmp_path / "evaluated", tmp_path / "pairs") == 0
    assert "1 of another set" in capsys.readouterr().out
    (pair,) = read_pairs(tmp_path / "pairs" / "pairs.jsonl")
    assert pair.rejected == (WRONG,)


@pytest.mark.parametrize(
    "body",
    ["<|im_end|>", "<|image_pad|>", "</tool_call>", "\ufffd", chr(0xD800), "<think>", "</caption>"],
)  # fmt: skip
def test_hostile_answers_are_left_out(body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: control tokens, tags and broken characters inside an answer keep it out of the file."""
    data = a_set(tmp_path / "set", RECORD)
    hostile = response_text(f"x {body} y", "z", "1")
    answers = a_file(tmp_path / "a.jsonl", {"id": "a", "response": hostile}, {"id": "a", "response": WRONG})
    assert made(data, answers, tmp_path / "pairs") == 0
    (pair,) = read_pairs(tmp_path / "pairs" / "pairs.jsonl")
    assert pair.rejected == (WRONG,)
    assert "1 in no valid form" in (said := capsys.readouterr().out) or "1 with control tokens" in said


def test_paths_and_markup_in_answers_are_text(tmp_path: Path) -> None:
    """Claim: an answer is kept as it is, whatever it looks like, and no file is named by it."""
    data = a_set(tmp_path / "set", RECORD)
    text = response_text("../../etc/passwd\u2028\x00", '<img src="file:///etc/passwd">', "/etc/passwd")
    answers = a_file(tmp_path / "a.jsonl", {"id": "a", "response": text, "image": "/etc/passwd"})
    assert made(data, answers, tmp_path / "pairs") == 0
    (pair,) = read_pairs(tmp_path / "pairs" / "pairs.jsonl")
    assert pair.rejected == (text,)
    assert sorted(one.name for one in (tmp_path / "pairs").iterdir()) == ["images", "pairs.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not a JSON object"),
        ("[1]", "a.jsonl:2: not a JSON object, but a list"),
        ({"response": WRONG}, "a.jsonl:2: field id: missing"),
        ({"id": "a"}, "a.jsonl:2: field text: missing; a line has id and response"),
        ({"id": "a", "response": 7}, "a.jsonl:2: field response: text expected, and it is a number"),
        ({"id": 7, "response": WRONG}, "a.jsonl:2: field id: text expected"),
    ],
)
def test_a_bad_line_is_one_error_that_names_it(
    line: dict[str, Any] | str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: and nothing is written."""
    data = a_set(tmp_path / "set", RECORD)
    answers = a_file(tmp_path / "a.jsonl", {"id": "a", "response": WRONG}, line)
    assert made(data, answers, tmp_path / "pairs") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not list(tmp_path.glob("*pairs*"))


def test_what_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: no pair, an evaluation-only set, a folder that is there, a damaged picture: one error, nothing written."""
    data = a_set(tmp_path / "set", RECORD)
    like = a_file(tmp_path / "like.jsonl", {"id": "a", "response": RIGHT})
    wrong = a_file(tmp_path / "wrong.jsonl", {"id": "a", "response": WRONG})
    reported = a_set(tmp_path / "reported", {**RECORD, "source": "mathvision/testmini"})
    marked = a_set(tmp_path / "mathvision_testmini", RECORD)
    damaged = a_set(tmp_path / "damaged", RECORD)
    (damaged / "images" / "a.png").write_bytes(b"no picture")
    pairs = tmp_path / "pairs"
    for given, message in (
        ((data, like, pairs), "no pair can be made, so nothing was written: 0 of 1 records stand above 0 of 1 answers"),
        ((reported, wrong, pairs), "is for evaluation only"),
        ((marked, wrong, pairs), "is for evaluation only"),
        ((data, wrong, tmp_path / "own" / "mathvision_testmini"), "is for evaluation only"),
        ((data, wrong, data), "is there already; name a folder that is not"),
        ((damaged, wrong, pairs), "field image: "),
        ((data, tmp_path / "none.jsonl", pairs), "is no file; name JSON lines with id and response"),
        ((tmp_path / "none", wrong, pairs), "does not exist"),
    ):
        assert made(*given) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert not list(tmp_path.glob("*pairs*"))
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: --data is needed: ")
    assert made(data, wrong, pairs, "--rejected", "0") == 2
    assert capsys.readouterr().err == "error: --rejected 0 must be at least 1\n"


def test_the_tool_of_a_checkout(tmp_path: Path) -> None:
    data = a_set(tmp_path / "set", RECORD)
    answers = a_file(tmp_path / "a.jsonl", {"id": "a", "response": WRONG})
    subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "make_pairs.py"), "--data", str(data), "--answers", str(answers),
         "--output", "pairs"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert len(read_pairs(tmp_path / "pairs" / "pairs.jsonl")) == 1
