"""Calls are answered once each, from endpoints that fail in every way, within what they allow.

Blind spot: real endpoints, which count tokens in their own ways.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest

from prism_megatron.config.tools.curate import Endpoint, Model, Recipe, Strong
from prism_megatron.curation.calls import Response
from prism_megatron.errors import ConfigError, EndpointError
from tests.unit.curation.asking import QUICK, Opened, answers, call, caller, model, only
from tests.unit.curation.mock_teacher import LASTING, PASSING, RATES, SAYING, Script, demonstration, gold, mock_teacher
from tests.waiting import wait_for

KEY = "sk-a-long-secret-key"


def test_a_call_is_asked_once(opened: Opened) -> None:
    """Claim: of the same call many times at once, then again, then by another process's store, one request comes; a
    call with another number is another call."""
    with mock_teacher(only("right"), seconds=0.05) as teacher:
        first = opened.caller(model(teacher.url))
        found = {future.result(30.0) for future in [first.ask(call(5)) for _ in range(20)]}
        found |= {first.ask(call(5)).result(0), opened.caller(model(teacher.url)).ask(call(5)).result(0)}
        assert len(teacher.log) == 1
        first.ask(call(5, number=1)).result(30.0)
        assert len(teacher.log) == 2
    (response,) = found
    assert (response.kind, response.text, response.finish) == ("answered", demonstration(gold(5), 5), "stop")
    assert (response.endpoint, response.tries) == (teacher.url, 1)
    counts = first.counts
    assert (counts.calls, counts.stored, counts.tries, counts.responses) == (22, 1, {"answered": 2}, {"answered": 2})
    assert counts.answer_tokens == 2 * response.answer_tokens > 0


@pytest.mark.parametrize("behaviour", [*SAYING, *PASSING, "down", "lost", "silent", "refused", "endless"])
def test_every_behaviour_has_one_response(opened: Opened, behaviour: str) -> None:
    """Claim: what is said is an answer, whatever it is worth; a failure that passes is tried again; one that lasts is
    tried as often as it may be; a refusal and a body that is too long are tried once. All of it is stored."""
    slow = behaviour in ("late", "silent")
    with mock_teacher(only(behaviour), passing=2, retry_after="0.01") as teacher:
        asker = opened.caller(model(teacher.url, seconds=1.5 if slow else 20.0, tries=3))
        response = asker.ask(call(7)).result(30.0)
        tries = Counter(asked.behaviour for asked in teacher.log)
    kind = {"refused": "refused", "endless": "oversized"}.get(behaviour, "unanswered" if behaviour in LASTING else "")
    expected = {"": 1} | dict.fromkeys(PASSING, 3) | dict.fromkeys(("down", "lost", "silent"), 3)
    assert response.kind == (kind or "answered")
    assert response.tries == sum(tries.values()) == expected.get(behaviour, 1)
    assert opened.store().get(call(7).key) == response
    if response.answered:
        assert response.finish == ("length" if behaviour in ("truncated", "repeats") else "stop")
        assert (response.text == demonstration(gold(7), 7)) == (behaviour in ("right", *PASSING))


def test_an_answer_of_50_mb_is_cut_and_counted(opened: Opened) -> None:
    with mock_teacher(only("endless")) as teacher:
        asker = opened.caller(model(teacher.url), limit_bytes=10**6)
        response = asker.ask(call(1)).result(30.0)
        assert teacher.bytes_sent < 25 * 10**6
    assert (response.kind, response.text) == ("oversized", "the answer is longer than 1000000 bytes")
    assert asker.counts.tries == {"oversized": 1}
    assert opened.path.stat().st_size < 10**6


def test_no_call_begins_before_retry_after(opened: Opened) -> None:
    """Claim: what one call is told holds for the whole endpoint, also for calls that come later."""
    with mock_teacher(Script({}), retry_after="0.5") as teacher:
        busy = Script({"busy": 1.0})
        teacher.script = busy
        asker = opened.caller(model(teacher.url, at_once=1))
        first = asker.ask(call(1))
        wait_for(lambda: len(teacher.log) == 1)
        teacher.script = Script({})
        others = [asker.ask(call(problem)) for problem in range(2, 6)]
        assert all(future.result(30.0).answered for future in [first, *others])
        times = teacher.times()
        assert len(times) == 6 and times[1] - times[0] >= 0.5


def test_an_endpoint_that_asks_for_a_day_ends_it(opened: Opened) -> None:
    with mock_teacher(only("busy"), retry_after="90000") as teacher:
        asker = opened.caller(model(teacher.url))
        with pytest.raises(EndpointError, match=r"teacher: all endpoints ask to come again in \d+ s .*429.*goes on"):
            asker.ask(call(1)).result(30.0)
    assert opened.store().get(call(1).key) is None


def test_no_more_at_once_than_asked_for(opened: Opened) -> None:
    with mock_teacher(only("right"), seconds=0.02) as teacher:
        answers(opened.caller(model(teacher.url, at_once=3)), range(20))
        assert 1 < teacher.most_at_once <= 3


def test_no_more_a_minute_than_the_limit(opened: Opened) -> None:
    """Claim: as the endpoint counts, tries that are made again among them. The minute here has half a second."""
    with mock_teacher(Script({"stumbles": 0.5}), passing=2) as teacher:
        asker = opened.caller(model(teacher.url, requests_per_minute=10), pace=replace(QUICK, minute=0.5))
        assert all(response.answered for response in answers(asker, range(20)))
        times = teacher.times()
        assert len(times) > 30
        assert all(later - earlier >= 0.5 for earlier, later in zip(times, times[10:], strict=False))


def test_no_more_tokens_a_minute_than_the_limit(opened: Opened) -> None:
    """Claim: a call is taken for as long as it may be until it has ended, and for as long as it was from then on."""
    estimated = 1000 + 64 + 8
    with mock_teacher(only("right")) as teacher:
        asker = opened.caller(
            model(teacher.url, tokens_per_minute=2 * estimated, at_once=8), pace=replace(QUICK, minute=0.5)
        )
        answers(asker, range(8))
        times = teacher.times()
        assert teacher.most_at_once <= 2, "two estimates fill the minute"
        assert times[-1] - times[0] < 1.0, "what they took leaves room for many more"


def test_calls_are_shared_out_by_weight(opened: Opened) -> None:
    with mock_teacher(only("right")) as one, mock_teacher(only("right")) as other:
        both = Model(
            name="teacher", endpoints=(Endpoint(one.url, weight=3.0, at_once=1), Endpoint(other.url, at_once=1))
        )
        asker = opened.caller(both)
        for problem in range(40):
            asker.ask(call(problem)).result(30.0)
        assert (len(one.log), len(other.log)) == (30, 10)
        first = [len([asked for asked in one.log if asked.at < end.at]) for end in other.log]
        assert first == [2, 5, 8, 11, 14, 17, 20, 23, 26, 29], "by turns, and not in blocks"


def test_others_take_the_calls_of_one_that_is_down(opened: Opened) -> None:
    """Claim: one that cannot be reached costs no call a try; one that fails whatever it is asked costs a few."""
    with mock_teacher(only("right")) as gone:
        pass
    with mock_teacher(only("down")) as failing, mock_teacher(only("right")) as well:
        slow = replace(QUICK, first_pause=0.5, longest_pause=60.0)
        asker = opened.caller(model(gone.url, failing.url, well.url, at_once=4, tries=6), pace=slow)
        responses = answers(asker, range(60))
        assert all(response.answered for response in responses)
        assert {response.endpoint for response in responses} == {well.url}
        assert sum(response.tries - 1 for response in responses) == len(failing.log) <= 20
        assert 1 <= asker.counts.tries["not_reached"] <= 20


def test_where_nobody_listens_it_ends(opened: Opened) -> None:
    """Claim: nothing is stored about calls that nobody heard, and each of them says so."""
    with mock_teacher(only("right")) as gone:
        pass
    for problems in (range(1), range(8)):
        asker = opened.caller(model(gone.url, tries=3, at_once=4))
        for future in [asker.ask(call(problem)) for problem in problems]:
            with pytest.raises(EndpointError, match=r"teacher: no endpoint can be reached \(http.*Connect.*goes on"):
                future.result(30.0)
    assert opened.store().totals().responses == 0


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("forbidden", "refuses the key .*401.*; set THE_KEY to one that it takes"),
        ("missing", "has no such model.*404.*served_model"),
        ("moved", "points elsewhere .*302"),
    ],
)
def test_an_endpoint_that_refuses_all_ends_it(opened: Opened, behaviour: str, words: str) -> None:
    """Claim: at once for all calls, naming role and endpoint; a redirect is not followed; nothing is stored."""
    with mock_teacher(only(behaviour)) as teacher:
        asker = opened.caller(model(teacher.url, key="THE_KEY", at_once=2), environment={"THE_KEY": KEY})
        for future in [asker.ask(call(problem)) for problem in range(10)]:
            with pytest.raises(ConfigError, match=f"teacher: {teacher.url} {words}") as raised:
                future.result(30.0)
            assert KEY not in str(raised.value)
        assert len(teacher.log) <= 4
    with pytest.raises(ConfigError, match="teacher: "):
        asker.ask(call(99)).result(30.0)
    assert opened.store().totals().responses == 0 and opened.store().look(call(0).key).name == "FREE"  # type: ignore[union-attr]


def test_the_key_is_sent_and_nowhere_else(opened: Opened) -> None:
    """Claim: no file of the store holds it, even where the endpoint says it in an answer."""
    with mock_teacher(
        Script({"refused": 0.3, "down": 0.3}), others={"parrot": lambda _: f"<answer>{KEY}</answer>"}
    ) as teacher:
        parrot = replace(model(teacher.url, key="THE_KEY"), name="parrot")
        asker = opened.caller(model(teacher.url, key="THE_KEY"), parrot, environment={"THE_KEY": f"{KEY}\n"})
        answers(asker, range(20))
        said = call(1, role="judge")
        response = asker.ask(replace(said, body={**said.body, "model": "parrot"})).result(30.0)
        assert teacher.keys == {f"Bearer {KEY}"}
    assert response.text == "<answer>…</answer>"
    kept = [path.read_bytes() for path in opened.path.parent.iterdir()]
    assert sum(map(len, kept)) > 10**4 and not any(KEY.encode() in data for data in kept)


def test_the_served_model_is_what_is_asked_for(opened: Opened) -> None:
    """Claim: an endpoint's own name for the model is sent, and is no part of the call."""
    with mock_teacher(only("right")) as teacher:
        opened.caller(model(teacher.url, served_model="their-teacher")).ask(call(1)).result(30.0)
        assert [asked.model for asked in teacher.log] == ["their-teacher"]
        opened.caller(model(teacher.url)).ask(call(1)).result(0)
        assert len(teacher.log) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:secret@host/v1", "a host and a path alone"),
        ("http://host/v1?key=secret", "a host and a path alone"),
        ("http://host/v1#secret", "a host and a path alone"),
        ("user:secret@host/v1", "'host/v1' must be a URL"),
        ("", "must be a URL"),
        ("http://host:0/v1", "a host and a path alone"),
        ("http://user:secret@host:x/v1", "is no URL"),
    ],
)
def test_an_address_is_a_host_and_a_path(opened: Opened, url: str, words: str) -> None:
    """Claim: and what may be a secret in one is not told."""
    with pytest.raises(ConfigError, match=f"teacher: .*{words}") as raised:
        opened.caller(model(url))
    assert "secret" not in str(raised.value)


def test_what_is_missing_is_told_at_the_start(opened: Opened) -> None:
    for unset in ({}, {"THE_KEY": " \n"}):
        with pytest.raises(ConfigError, match=r"teacher: http://a/v1 needs the key that .* THE_KEY holds"):
            opened.caller(model("http://a/v1", key="THE_KEY"), environment=unset)
    with pytest.raises(ConfigError, match="THE_KEY holds what is no key") as raised:
        opened.caller(model("http://a/v1", key="THE_KEY"), environment={"THE_KEY": "schlüssel"})
    assert "schlüssel" not in str(raised.value)
    with pytest.raises(ConfigError, match="teacher has no endpoint"):
        opened.caller(model())


def test_models_have_the_names_of_calls() -> None:
    one = Model(name="m")
    recipe = Recipe(teacher=one, judge=one, strong=(Strong(one), Strong(one)))
    assert list(recipe.models) == ["strong 0", "strong 1", "teacher", "judge"]
    assert list(Recipe(disambiguator=one).models) == ["teacher", "disambiguator"]


def test_closing_waits_for_nothing(opened: Opened) -> None:
    """Claim: calls that are under way are ended and free again, and no thread is left."""
    store = opened.store()
    before = threading.active_count()
    with mock_teacher(only("silent"), silence_seconds=0.5) as teacher:
        asker = caller(store, model(teacher.url, seconds=600.0, at_once=2))
        futures = [asker.ask(call(problem)) for problem in range(5)]
        wait_for(lambda: len(teacher.log) == 2)
        asker.close()
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(0)
        with pytest.raises(RuntimeError, match="is closed"):
            asker.ask(call(9))
    wait_for(lambda: threading.active_count() == before)
    assert store.claim(call(0).key).result().name == "OURS"  # type: ignore[union-attr]


def test_an_endpoint_of_two_models_is_one(opened: Opened) -> None:
    """Claim: where two models name it in the same words, with the same model, its limits are for both together."""
    with mock_teacher(only("right"), seconds=0.02) as teacher:
        shared = model(teacher.url, at_once=2)
        asker = opened.caller(shared, shared)
        futures = [asker.ask(call(problem, role=role)) for problem in range(10) for role in ("teacher", "judge")]
        assert all(future.result(30.0).answered for future in futures) and asker.at_once == 2
        assert teacher.most_at_once == 2
        assert len(teacher.log) == 10, "a role is no part of a call"


def test_responses_are_the_same_for_all_who_ask(opened: Opened) -> None:
    """Claim: what the mock would do is what is stored, over all its behaviours but silence."""
    script = Script({behaviour: rate for behaviour, rate in RATES.items() if behaviour not in ("late", "silent")})
    with mock_teacher(script, retry_after="0.01") as teacher:
        asker = opened.caller(model(teacher.url, seconds=30.0, tries=3, at_once=8))
        responses: list[Response] = answers(asker, range(300))
        assert len(teacher.log) == sum(asker.counts.tries.values())
    for problem, response in enumerate(responses):
        plan = script.plan(call(problem).body)
        lasting = {"refused": "refused", "endless": "oversized"}.get(plan.behaviour, "unanswered")
        assert response.kind == (lasting if plan.behaviour in LASTING else "answered"), plan
        if response.answered:
            assert (response.text, response.finish) == (plan.answer, plan.finish)
    assert {script.behaviour_of(problem) for problem in range(300)} >= {*SAYING, *PASSING, "refused", "endless"} - {
        "late"
    }
