"""What falls before the teacher is asked: duplicates, what training refuses, what is easy, what nobody can check."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.tools.curate import Recipe, Strong
from prism_megatron.curation.calls import Call, Response
from prism_megatron.curation.correct import NO_VERDICT
from prism_megatron.curation.deduplicate import UNUSABLE
from prism_megatron.curation.select import BAD_IMAGE, NO_EVIDENCE, NOT_CHECKABLE, TOO_EASY
from tests.unit.curation.fakes import (
    JUDGE,
    TEACHER,
    FakeAsker,
    Respond,
    answered,
    drop,
    fates,
    image_of,
    model,
    name_of,
    play,
    record,
    rows,
    text_of,
    verdict,
    write_pool,
)

LONG = "It is the circle on the left because it is the one that touches the line."
STRONG = (Strong(model("big"), samples=3), Strong(model("other"), samples=1))


def never(call: Call) -> str:
    raise AssertionError(f"{call.role} was asked")


def select(tmp_path: Path, records: list[dict[str, Any]], respond: Respond, **recipe: Any) -> FakeAsker:
    asker = FakeAsker(respond)
    pool = write_pool(tmp_path / "pool", records)
    play(tmp_path / "out", Recipe(data=(pool,), teacher=TEACHER, **recipe), asker, until="select")
    return asker


def test_duplicates_and_what_training_refuses_fall_first(tmp_path: Path) -> None:
    """Claim: nobody is asked about them, and the reason and the other one stand in the file."""
    records = [
        record("fine"),
        record("twin"),
        record("token", question="How many <|im_start|> has token?"),
        record("tagged", answer="<think>", answer_type="text"),
        record("chosen", answer="B", answer_type="choice", choices=["<|vision_pad|>", "b"]),
    ]
    pool = write_pool(tmp_path / "pool", records)
    recipe = Recipe(data=(pool,), teacher=TEACHER)
    play(tmp_path / "out", recipe, FakeAsker(never), deduplicate=drop({"twin": "the same question"}), until="select")
    assert fates(tmp_path / "out", "deduplicate") == {
        "fine": "kept", "twin": "the same question", "token": UNUSABLE, "tagged": UNUSABLE, "chosen": UNUSABLE,
    }  # fmt: skip
    assert rows(tmp_path / "out", "deduplicate")[1]["detail"] == "other"
    assert fates(tmp_path / "out", "select") == {"fine": "kept"}


def test_what_a_strong_model_passes_falls(tmp_path: Path) -> None:
    """Claim: each model is asked its number of times, its own answers are its rate, and the highest rate counts; an
    answer without tags, or one that was cut off before them, is wrong."""

    def respond(call: Call) -> Response | str:
        name = name_of(call)
        if name == "easy":
            return "So <answer>3</answer>"
        if name == "once":
            return "<answer>3.0</answer>" if call.role == "strong 0" and call.number == 2 else "<answer>4</answer>"
        if name == "cut":
            return answered("It is 3, so <answer>3", finish="length")
        return "It is 3."

    names = ("easy", "once", "cut", "untagged")
    asker = select(tmp_path, [record(name) for name in names], respond, strong=STRONG)
    assert fates(tmp_path / "out", "select") == {"easy": TOO_EASY, "once": TOO_EASY, "cut": "kept", "untagged": "kept"}
    found = {row["problem"]["id"]: row["found"]["select"] for row in rows(tmp_path / "out", "select")}
    assert found["once"]["pass_rates"] == [1 / 3, 0.0] and found["once"]["pass_rate"] == 1 / 3
    for name in names:
        calls = [call for call in asker.calls if name_of(call) == name]
        assert sorted((call.role, call.number) for call in calls) == [
            ("strong 0", 0), ("strong 0", 1), ("strong 0", 2), ("strong 1", 0),
        ]  # fmt: skip
    assert [note["outcome"] for note in found["once"]["calls"]] == ["wrong", "wrong", "right", "wrong"]


def test_a_pass_rate_may_be_allowed(tmp_path: Path) -> None:
    def respond(call: Call) -> str:
        return "<answer>3</answer>" if call.number < (2 if name_of(call) == "a" else 3) else "<answer>4</answer>"

    select(tmp_path, [record("a"), record("b")], respond, strong=(Strong(model("big"), samples=4),), keep_to=0.5)
    assert fates(tmp_path / "out", "select") == {"a": "kept", "b": TOO_EASY}


def test_no_answer_says_nothing_about_a_problem(tmp_path: Path) -> None:
    """Claim: calls that came to nothing count in no rate, and a problem of which a model said nothing at all falls."""

    def respond(call: Call) -> Response | str:
        if call.role == "strong 0" and (name_of(call) == "none" or call.number != 1):
            return Response("unanswered", "no answer in 6 tries")
        return "<answer>4</answer>"

    select(tmp_path, [record("none"), record("some")], respond, strong=STRONG)
    assert fates(tmp_path / "out", "select") == {"none": NO_EVIDENCE, "some": "kept"}
    assert rows(tmp_path / "out", "select")[1]["found"]["select"]["pass_rates"] == [0.0, 0.0]


def test_without_strong_models_all_are_kept_that_can_be_checked(tmp_path: Path) -> None:
    select(tmp_path, [record("a"), record("long", LONG)], never)
    assert fates(tmp_path / "out", "select") == {"a": "kept", "long": NOT_CHECKABLE}


def test_a_judge_checks_what_rules_cannot(tmp_path: Path) -> None:
    """Claim: of answers to a sentence the judge alone says whether they are right, and of others it is not asked."""

    def respond(call: Call) -> str:
        if call.role == "judge":
            asked = json.loads(text_of(call)[text_of(call).index("{") : text_of(call).rindex("}") + 1])
            assert asked["right_answer"] == LONG and image_of(call) is None
            return verdict(asked["given_answer"] == "the left one")
        return "<answer>the left one</answer>" if name_of(call) == "easy" else "<answer>none</answer>"

    asker = select(
        tmp_path, [record("easy", LONG), record("hard", LONG), record("a")], respond, strong=STRONG[1:], judge=JUDGE
    )
    assert fates(tmp_path / "out", "select") == {"easy": TOO_EASY, "hard": "kept", "a": "kept"}
    assert len(asker.of("judge")) == 2


def test_a_judge_without_a_verdict_is_asked_once_more(tmp_path: Path) -> None:
    """Claim: and then the answer is wrong."""

    def respond(call: Call) -> Response | str:
        if call.role != "judge":
            return "<answer>the left one</answer>"
        if "second" in text_of(call) and call.number == 1:
            return verdict(True)
        return answered(verdict(True), finish="length") if call.number else "<verdict>right</verdict>" * 2

    asker = select(tmp_path, [record("never", LONG), record("second", LONG)], respond, strong=STRONG[1:], judge=JUDGE)
    assert fates(tmp_path / "out", "select") == {"never": "kept", "second": TOO_EASY}
    assert sorted(call.number for call in asker.of("judge")) == [0, 0, 1, 1]
    told = rows(tmp_path / "out", "select")[0]["found"]["select"]["calls"]
    assert told[0]["detail"] == f"by judge {NO_VERDICT}" and [one["outcome"] for one in told[1:]] == ["no verdict"] * 2


def test_an_image_that_cannot_be_read_falls(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", [record("a"), record("b")])
    (pool / "images" / "a.png").write_bytes(b"no image")
    play(tmp_path / "out", Recipe(data=(pool,), teacher=TEACHER), FakeAsker(never), until="select")
    assert fates(tmp_path / "out", "select") == {"a": BAD_IMAGE, "b": "kept"}


def test_what_is_sent(tmp_path: Path) -> None:
    """Claim: the image's own bytes, then the question with its choices; settings that are None, or taken away, are not
    sent, and seeds differ between samples and not between problems."""
    one = replace(model("big"), temperature=None, top_p=0.9, request_fields='{"top_k": 5, "max_tokens": null}')
    fields: dict[str, Any] = {"answer": "B", "answer_type": "choice", "choices": ["two", "three"]}
    asker = select(
        tmp_path, [record("a", **fields), record("b", **fields)], lambda _: "", strong=(Strong(one, samples=2),)
    )
    bodies = [call.body for call in asker.calls]
    assert all(body.keys() == {"model", "messages", "top_p", "top_k", "seed"} for body in bodies)
    assert len({body["seed"] for body in bodies}) == 2 and len({call.key for call in asker.calls}) == 4
    first = min(asker.calls, key=lambda call: (name_of(call), call.number))
    assert [part["type"] for part in first.body["messages"][0]["content"]] == ["image_url", "text"]
    assert text_of(first).endswith("How many dots has a?\nA. two\nB. three")
    assert (image_of(first) or "").startswith("data:image/png;base64,")


@pytest.mark.parametrize("threads", [1, 8])
def test_rows_stand_in_the_pools_order(threads: int, tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(50)]
    asker = FakeAsker(lambda _: "<answer>4</answer>", threads=threads)
    pool = write_pool(tmp_path / "pool", [record(name) for name in names])
    play(tmp_path / "out", Recipe(data=(pool,), teacher=TEACHER, strong=STRONG), asker, until="select")
    assert list(fates(tmp_path / "out", "select")) == names
