"""An OpenAI-compatible endpoint: what it is sent, how often, and what its answers and failures count as.

Blind spot: real servers (``tests/sglang/test_evaluate.py``).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.render import Renderer
from prism_megatron.errors import ConfigError
from prism_megatron.rollout.base import Sampling
from prism_megatron.stages.evaluate import chat_client
from prism_megatron.stages.evaluate.chat_client import ChatClient, RefusedError, UnansweredError
from prism_megatron.stages.evaluate.endpoint import EndpointAsker, Served
from prism_megatron.stages.evaluate.policy import Settings
from prism_megatron.stages.evaluate.questions import Batch, batches_of, read_questions
from tests.unit.stages.fake_chat import FakeChat, always, answer, fake_chat, image_of, question_of

KEY = "a-secret-key"
GOOD = "<caption>\nx\n</caption>\n<think>\ny\n</think>\n<answer>3</answer>"
SERVED = Served("mini", "Answer.", {}, counts_unanswered=False)
SETTINGS = Settings(2, Sampling(0.7, 0.9, 64), seed=5, max_prompt_tokens=2048, strict_format=True)
# Zero pauses would be no pauses; tests that look at pauses ask for them.
PAUSE = 0.01


CLIENTS: list[ChatClient] = []


@pytest.fixture(autouse=True)
def _short_pauses_and_no_clients_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chat_client, "_FIRST_PAUSE", PAUSE)
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def client_of(chat: FakeChat, *, attempts: int = 3, seconds: float = 20.0) -> ChatClient:
    CLIENTS.append(ChatClient(chat.url, api_key=KEY, seconds=seconds, attempts=attempts))
    return CLIENTS[-1]


def asker_of(chat: FakeChat, served: Served = SERVED, settings: Settings = SETTINGS, *, at_once: int = 4,
             renderer: Renderer | None = None, has_answered: bool = False) -> EndpointAsker:  # fmt: skip
    return EndpointAsker(
        client_of(chat), served, settings, renderer=renderer, at_once=at_once, has_answered=has_answered
    )


def batch(count: int = 3) -> Batch:
    (one,) = batches_of(read_questions((), part="all", limit=None, scenes=count, seed=7), count)
    return one


def test_what_is_sent() -> None:
    """Claim: system prompt, then image and question in this order; the picture without loss; greedy and drawn apart."""
    with fake_chat(always(200, {}, answer(GOOD, usage={"completion_tokens": 9, "prompt_tokens": 40}))) as chat:
        asker = asker_of(chat, replace(SERVED, fields={"top_k": -1, "max_tokens": None, "max_completion_tokens": 64}))
        asked = batch(1)
        said = asker.ask(asked)
        asker.close()
    assert [[(one.text, one.ended, one.truncated, one.tokens, one.failure) for one in own] for own in said] == [
        [(GOOD, True, False, 9, "")] * 3
    ]
    assert set(chat.keys) == {f"Bearer {KEY}"}
    (greedy,) = [body for body in chat.bodies if body["temperature"] == 0]
    drawn = [body for body in chat.bodies if body["temperature"] != 0]
    assert greedy.keys() == {"model", "messages", "temperature", "top_k", "max_completion_tokens"}
    assert greedy["messages"][0] == {"role": "system", "content": "Answer."}
    assert [part["type"] for part in greedy["messages"][1]["content"]] == ["image_url", "text"]
    assert question_of(greedy) == asked.questions[0].text
    assert np.array_equal(np.asarray(image_of(greedy)), np.asarray(asked.questions[0].image()))
    assert [(one["temperature"], one["top_p"]) for one in drawn] == [(0.7, 0.9)] * 2
    assert len({one["seed"] for one in drawn}) == 2


def test_without_a_system_prompt_none_is_sent() -> None:
    with fake_chat(always(200, {}, answer(GOOD))) as chat:
        asker = asker_of(chat, replace(SERVED, system_prompt=None), replace(SETTINGS, samples=0))
        (((said),),) = asker.ask(batch(1))
        asker.close()
    assert [one["role"] for one in chat.bodies[0]["messages"]] == ["user"]
    assert said.tokens is None, "an endpoint need not say lengths"


def test_seeds_are_those_of_the_question() -> None:
    """Claim: the same again for a question that is asked again, others for another sample, question or seed."""

    def seeds(asked: Batch, seed: int = 5) -> dict[str, list[int]]:
        with fake_chat(always(200, {}, answer(GOOD))) as chat:
            asker = asker_of(chat, settings=replace(SETTINGS, seed=seed), at_once=1)
            asker.ask(asked)
            asker.close()
        found: dict[str, list[int]] = {}
        for body in chat.bodies:
            if "seed" in body:
                found.setdefault(question_of(body), []).append(body["seed"])
        return found

    first, again, other = seeds(batch(3)), seeds(batch(3)), seeds(batch(3), seed=6)
    assert first == again
    everyone = [seed for own in (*first.values(), *other.values()) for seed in own]
    assert len(everyone) == len(set(everyone)) == 12


def test_no_more_at_once_than_asked_for() -> None:
    def slow(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        time.sleep(0.02)  # slow on purpose: requests that come meanwhile are under way at once
        return 200, {}, answer(GOOD)

    with fake_chat(slow) as chat:
        asker = asker_of(chat, at_once=3)
        asker.ask(batch(6))
        asker.close()
    assert len(chat.bodies) == 18 and 1 < chat.most_at_once <= 3


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_is_told_to_come_again_is_asked_again(status: int) -> None:
    """Claim: as often as it may be, with growing pauses, and no more; then nobody has answered."""
    tries: Counter[str] = Counter()

    def busy(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        tries["all"] += 1
        return (status, {}, {"error": {"message": "busy"}}) if tries["all"] < 3 else (200, {}, answer(GOOD))

    with fake_chat(busy) as chat:
        began = time.monotonic()
        assert client_of(chat, attempts=3).ask({}).text == GOOD
        assert time.monotonic() - began >= 3 * PAUSE
        tries["all"] = -10
        with pytest.raises(UnansweredError, match=rf"no answer in 3 tries; the last time: HTTP {status}: .*busy"):
            client_of(chat, attempts=3).ask({})
        assert len(chat.bodies) == 6


def test_retry_after_is_heeded() -> None:
    """Claim: seconds or a date are waited for, and one that is too far is not waited for at all."""
    told: list[str] = []

    def later(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return (429, {"Retry-After": told.pop()}, "slow down") if told else (200, {}, answer(GOOD))

    with fake_chat(later) as chat:
        told.append("0.4")
        began = time.monotonic()
        client_of(chat).ask({})
        assert time.monotonic() - began >= 0.4
        told.append("900")
        with pytest.raises(UnansweredError, match="asks to wait 900 s, more than --request-seconds 20"):
            client_of(chat).ask({})


def test_a_silent_endpoint_is_left() -> None:
    release = threading.Event()

    def silent(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        release.wait(20.0)
        return 200, {}, answer(GOOD)

    with fake_chat(silent) as chat:
        with pytest.raises(UnansweredError, match=r"no answer in 1 tries; .*ReadTimeout"):
            client_of(chat, attempts=1, seconds=0.2).ask({})
        release.set()
    with pytest.raises(UnansweredError, match="cannot be reached"):
        client_of(chat, attempts=2).ask({})  # nobody listens there any more


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ((400, {}, {"error": {"message": f"too long, {KEY}"}}), "HTTP 400: .*too long, …"),
        ((200, {}, "<html>"), "not in the protocol"),
        ((200, {}, {"choices": []}), "not in the protocol"),
        ((200, {}, []), "not in the protocol"),
        ((200, {}, answer(None)), "has no text"),
        ((200, {}, answer("x", reason="content_filter")), "ended for the reason 'content_filter'"),
    ],
)
def test_what_is_no_answer_is_a_failure_of_that_question(sent: tuple[int, dict[str, str], Any], words: str) -> None:
    """Claim: asked once, and never taken for an answer; the key is in no message."""
    with fake_chat(always(*sent)) as chat:
        with pytest.raises(RefusedError, match=words) as caught:
            client_of(chat).ask({})
        assert KEY not in str(caught.value) and len(chat.bodies) == 1
        asker = asker_of(chat, settings=replace(SETTINGS, samples=0), has_answered=True)
        (((said),),) = asker.ask(batch(1))
        asker.close()
    assert said.failure == str(caught.value) and said.text == "" and not said.ended


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_takes_nothing_ends_the_evaluation(status: int) -> None:
    with fake_chat(always(status, {}, {"error": KEY})) as chat:
        asker = asker_of(chat, replace(SERVED, counts_unanswered=True))
        with pytest.raises(ConfigError) as caught:
            asker.ask(batch(2))
        asker.close()
    assert KEY not in str(caught.value)
    assert ("PRISM_EVALUATE_API_KEY" if status < 404 else "--served-model") in str(caught.value)


def test_an_unanswered_request_stops_or_counts() -> None:
    """Claim: by default one that nobody answered ends it, naming the question; asked to, it is a failure of its own."""
    asked = batch(3)
    lost = asked.questions[1].text

    def some(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        return (503, {}, "down") if question_of(body) == lost else (200, {}, answer(GOOD))

    with fake_chat(some) as chat:
        asker = asker_of(chat)
        with pytest.raises(UnansweredError, match=rf"{asked.questions[1].item.id}: .*--on-unanswered") as caught:
            asker.ask(asked)
        asker.close()
        assert "\n" not in str(caught.value)
        asker = asker_of(chat, replace(SERVED, counts_unanswered=True))
        said = asker.ask(asked)
        asker.close()
    assert [[bool(one.failure) for one in own] for own in said] == [[False] * 3, [True] * 3, [False] * 3]


def test_what_goes_on_after_its_answer_is_cut_where_training_cuts_it() -> None:
    for reason in ("stop", "length"):
        text = f"{GOOD}\n and more"
        with fake_chat(always(200, {}, answer(text, reason=reason))) as chat:
            asker = asker_of(chat, settings=replace(SETTINGS, samples=0))
            (((said),),) = asker.ask(batch(1))
            asker.close()
        assert (said.text, said.ended, said.truncated) == (f"{GOOD}\n a", False, False)
    with fake_chat(always(200, {}, answer(GOOD[:9], reason="length"))) as chat:
        asker = asker_of(chat, settings=replace(SETTINGS, samples=0))
        (((said),),) = asker.ask(batch(1))
        asker.close()
    assert (said.text, said.ended, said.truncated) == (GOOD[:9], False, True)


def test_the_served_files_say_how_long_every_prompt_is() -> None:
    """Claim: an endpoint that reads another prompt is refused; one that does not say is believed; long ones fail."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    asked = batch(1)
    wanted = len(renderer.prompt("x", asked.questions[0].text, [asked.questions[0].image()]).token_ids)
    one = replace(SETTINGS, samples=0)
    cases: list[tuple[dict[str, int], bool]] = [
        ({"prompt_tokens": wanted}, True),
        ({}, True),
        ({"prompt_tokens": wanted + 1}, False),
    ]
    for usage, passes in cases:
        with fake_chat(always(200, {}, answer(GOOD, usage=usage))) as chat:
            asker = asker_of(chat, settings=one, renderer=renderer)
            if passes:
                assert asker.ask(asked)[0][0].failure == ""
            else:
                with pytest.raises(ConfigError, match=f"read {wanted + 1} tokens where --served-files makes {wanted}"):
                    asker.ask(asked)
            asker.close()
    with fake_chat(always(200, {}, answer(GOOD))) as chat:
        asker = asker_of(chat, settings=replace(one, max_prompt_tokens=wanted - 1), renderer=renderer)
        (((said),),) = asker.ask(asked)
        asker.close()
        assert f"takes {wanted} tokens, of which --max-prompt-tokens allows {wanted - 1}" in said.failure
        assert chat.bodies == []


def test_images_are_sent_in_the_size_that_training_sees() -> None:
    """Claim: with the served files, and then a server has nothing left to resize."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy", max_pixels=64 * 64)
    with fake_chat(always(200, {}, answer(GOOD))) as chat:
        asker = asker_of(chat, settings=replace(SETTINGS, samples=0), renderer=renderer)
        asker.ask(batch(1))
        asker.close()
    assert image_of(chat.bodies[0]).size == (64, 64)


def test_the_environment_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a proxy of the environment sees neither key nor questions."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with fake_chat(always(200, {}, answer(GOOD))) as chat:
        assert client_of(chat, attempts=1).ask({}).text == GOOD


def test_an_endpoint_that_points_elsewhere_is_no_refusal_of_a_question() -> None:
    moved = always(302, {"Location": "https://elsewhere/v1"}, "moved")
    with fake_chat(moved) as chat, pytest.raises(ConfigError, match="points elsewhere"):
        client_of(chat).ask({})
    assert len(chat.bodies) == 1


def test_a_key_is_hidden_before_a_complaint_is_cut() -> None:
    """Claim: no part of the key is shown, wherever in a long complaint it stands."""
    for place in range(150, 205):
        with fake_chat(always(400, {}, "x" * place + KEY)) as chat, pytest.raises(RefusedError) as raised:
            client_of(chat).ask({})
        assert KEY[:4] not in str(raised.value)
