"""The file of answers: what a kill leaves, and whose lines are refused; and folders that are compared with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.errors import ConfigError, DataError
from prism_megatron.evaluation.benchmark.answers import ANSWERS, AnswerFile, Item, places_of
from prism_megatron.evaluation.benchmark.folder import BEGUN, SUMMARY, check_same_questions, read_evaluation
from tests.unit.evaluation.benchmark.lines import line, lines


def test_what_whole_batches_have_is_kept(tmp_path: Path) -> None:
    """Claim: after a kill at any byte whole batches are kept, and the file ends where the next one begins."""
    answers = lines([[True, False], [False, False], [True, True]])
    file = AnswerFile(tmp_path / ANSWERS, [one.place for one in answers], [6, 3])
    assert file.reopen() == ([], 0)
    file.append(answers[:6])
    file.append(answers[6:])
    data = file.path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(0, len(data) + 1, 7):
        file.path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        batches = (whole >= 6) + (whole == 9)
        kept = (0, 6, 9)[batches]
        assert file.reopen() == (answers[:kept], batches)
        assert file.path.read_bytes() == data[: ends[kept - 1] if kept else 0]
    file.path.write_bytes(data)
    assert file.reopen() == (answers, 2)
    assert file.path.read_bytes() == data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": "other"}, r"answers.jsonl:1: 'other' \(greedy\) is not the answer of its place"),
        ({"digest": "other"}, r"answers.jsonl:1: 'q-0' \(greedy\) is not the answer of its place"),
        ({"counts": 1}, "answers.jsonl:1: field counts: bool expected"),
        ({"tokens": 1.5}, r"answers.jsonl:1: field tokens: int \| None expected"),
        ({"text": None}, "answers.jsonl:1: field text: str expected"),
    ],
)
def test_lines_of_others_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / ANSWERS, [line().place], [1])
    file.path.write_text(json.dumps({**asdict(line()), **changes}) + "\n")
    with pytest.raises(DataError, match=words):
        file.reopen()


def test_the_order_of_the_file() -> None:
    places = places_of(Item("s", "q", "d", "choice", "s"), 2)
    assert [(one.mode, one.sample) for one in places] == [("greedy", 0), ("sampled", 0), ("sampled", 1)]


def evaluated(folder: Path, *, digest: str = "d", count: int = 2) -> Path:
    folder.mkdir()
    answers = [line(f"q-{i}", digest=digest) for i in range(count)]
    AnswerFile(folder / ANSWERS, (), ()).append(answers)
    (folder / BEGUN).write_text(json.dumps({"config": {}}))
    (folder / SUMMARY).write_text("{}")
    return folder


def test_only_a_finished_evaluation_of_the_same_questions_is_compared_with(tmp_path: Path) -> None:
    """Claim: each difference is one line that names it."""
    own = [line("q-0"), line("q-1")]
    check_same_questions(own, read_evaluation(evaluated(tmp_path / "same")))
    for name, forms, words in (
        ("more", {"count": 3}, "has 3 questions and this one 2, and made/q-2 is in that one alone"),
        ("fewer", {"count": 1}, "has 1 questions and this one 2, and made/q-1 is in this one alone"),
        ("other", {"digest": "e"}, r"made/q-0 has another question, answer or image there \(2 of 2 have\)"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            check_same_questions(own, read_evaluation(evaluated(tmp_path / name, **forms)))
        assert "\n" not in str(caught.value)
    (tmp_path / "same" / SUMMARY).unlink()
    with pytest.raises(ConfigError, match="same holds no finished evaluation"):
        read_evaluation(tmp_path / "same")
    (tmp_path / "other" / ANSWERS).write_text("")
    with pytest.raises(DataError, match=r"answers.jsonl is empty"):
        read_evaluation(tmp_path / "other")
