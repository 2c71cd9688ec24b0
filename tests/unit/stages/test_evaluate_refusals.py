"""An endpoint that refuses requests: a failure of some questions, or one error about all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands.evaluate import parse
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError
from prism_megatron.stages.evaluate.build import evaluate_on
from tests.unit.stages.fake_chat import FakeChat, always, answer, fake_chat, question_of
from tests.unit.stages.test_evaluate_endpoint import GOOD, KEY, SERVED, asker_of, batch


def refusals(chat: FakeChat, *, count: bool = False, has_answered: bool = False, batches: int = 1) -> list[str]:
    """The failures of three questions, asked so many times, each with two samples."""
    asker = asker_of(chat, replace(SERVED, counts_unanswered=count), has_answered=has_answered)
    try:
        return [one.failure for _ in range(batches) for own in asker.ask(batch(3)) for one in own]
    finally:
        asker.close()


@pytest.mark.parametrize(
    ("status", "flag"), [(400, "--request-fields"), (405, "--request-fields"), (413, "--max-pixels"), (422, "--req")]
)
def test_an_endpoint_that_refuses_all_from_the_start_is_told_at_once(status: int, flag: str) -> None:
    """Claim: with what it said and the flag that may mend it; nothing of it where an answer came before, or where
    failures are to count."""
    with fake_chat(always(status, {}, {"error": f"unknown field, {KEY}"})) as chat:
        with pytest.raises(ConfigError, match=rf"refuses each of these 9 requests: HTTP {status}: .*unknown") as caught:
            refusals(chat)
        said = str(caught.value)
        assert flag in said and "--on-unanswered count" in said and KEY not in said and "\n" not in said
        for settings in ({"has_answered": True}, {"count": True}):
            assert {one[:8] for one in refusals(chat, **settings)} == {f"HTTP {status}"}


def test_refusals_of_some_questions_are_failures() -> None:
    """Claim: one answer, another status, or a server's own trouble is enough not to blame the requests' form; once one
    was answered, later batches may be refused whole."""
    first = batch(3).questions[0].text
    special: list[tuple[int, Any]] = []
    others = [400]

    def respond(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if special and question_of(body) == first:
            return special[0][0], {}, special[0][1]
        return others[0], {}, "no"

    with fake_chat(respond) as chat:
        for one in ((200, answer(GOOD)), (422, "no"), (200, answer(None))):
            special[:] = [one]
            assert [bool(failure) for failure in refusals(chat)][3:] == [True] * 6
        special.clear()
        others[0] = 501
        assert all(refusals(chat))
    with fake_chat(lambda _body: (200, {}, answer(GOOD)) if len(chat.bodies) <= 9 else (400, {}, "no")) as chat:
        assert [bool(failure) for failure in refusals(chat, batches=2)] == [False] * 9 + [True] * 9


def test_batches_without_an_answer_are_still_the_start() -> None:
    """Claim: whether a batch is refused as such hangs on answers before it alone, and not on its number."""
    with fake_chat(lambda _body: (200, {}, answer(None)) if len(chat.bodies) <= 9 else (400, {}, "no")) as chat:
        with pytest.raises(ConfigError, match="refuses each of these 9 requests"):
            refusals(chat, batches=2)
        assert len(chat.bodies) == 18


def test_a_flag_that_mends_refused_requests_is_given_in_the_same_folder(world: World, tmp_path: Path) -> None:
    """Claim: and once there are answers on the disk, a batch that is refused whole counts, as it would have without an
    interruption."""
    taken = ["max_completion_tokens"]

    def respond(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return (200, {}, answer(GOOD)) if set(taken) & body.keys() else (400, {}, "unsupported: max_tokens")

    mended = ("--request-fields", '{"max_tokens": null, "max_completion_tokens": 64}')
    out = tmp_path / "out"
    with fake_chat(respond) as chat:

        def evaluate(*flags: str) -> None:
            words = [chat.url, "--scenes", "4", "--questions-at-once", "2", "--served-model", "fake"]
            evaluate_on(world, parse([*words, "--output", str(out), *flags]))

        with pytest.raises(ConfigError, match="refuses each of these 2 requests: HTTP 400: unsupported: max_tokens"):
            evaluate()
        evaluate(*mended)
        lines = (out / "answers.jsonl").read_text().splitlines()
        (out / "answers.jsonl").write_text("\n".join(lines[:3]))  # as a kill leaves it
        taken.clear()
        evaluate(*mended)
    assert [bool(json.loads(one)["failure"]) for one in (out / "answers.jsonl").read_text().splitlines()] == [
        False, False, True, True
    ]  # fmt: skip
