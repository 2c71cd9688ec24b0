"""Calls to one server: what is repeated, what is not, and what they pass on their way."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from prism_megatron.errors import RolloutError
from prism_megatron.rollout.sglang.http import ServerClient, ServerLostError, ServerRefusedError
from tests.unit.rollout.attached import IMPATIENT
from tests.unit.rollout.fake_sglang import KEY, FakeSGLang, running
from tests.waiting import wait_for

AGAIN = "/continue_generation"
"""A call that may be made twice."""


@pytest.fixture
def fake() -> Iterator[FakeSGLang]:
    with running(image_token_id=498) as fake:
        yield fake


@pytest.fixture
def client(fake: FakeSGLang) -> Iterator[ServerClient]:
    client = ServerClient(fake.url, api_key=KEY, patience=IMPATIENT)
    yield client
    client.close()


def test_a_lost_server_is_asked_again_where_that_does_no_harm(fake: FakeSGLang, client: ServerClient) -> None:
    """Until it is back; a call that may be made only once breaks off."""
    fake.die_at = AGAIN
    with pytest.raises(ServerLostError):
        client.post(AGAIN, {})
    assert fake.paths() == [AGAIN]

    def back() -> None:
        wait_for(lambda: len(fake.calls) > 3)
        fake.restart()

    thread = threading.Thread(target=back)
    thread.start()
    assert client.post_again(AGAIN, {}) == {"status": "ok"}
    thread.join()


def test_a_lost_server_is_given_up_when_the_time_is_over(fake: FakeSGLang, client: ServerClient) -> None:
    fake.die_at = AGAIN
    with pytest.raises(ServerLostError):
        client.post_again(AGAIN, {}, seconds=0.5)
    assert len(fake.calls) > 2


def test_a_refusal_is_final(fake: FakeSGLang, client: ServerClient) -> None:
    fake.refuse[AGAIN] = 2
    with pytest.raises(ServerRefusedError, match="HTTP 400: /continue_generation was refused") as refusal:
        client.post_again(AGAIN, {})
    assert refusal.value.status == 400 and fake.paths() == [AGAIN]


def test_an_answer_that_is_no_object_is_an_error(client: ServerClient) -> None:
    body = {"input_ids": [[5]], "sampling_params": {"n": 1, "stop_token_ids": [6]}, "token_ids_logprob": []}
    with pytest.raises(RolloutError, match="answers with a list where an object was expected"):
        client.post_again("/generate", body)


def test_nothing_passes_a_proxy_of_the_environment(fake: FakeSGLang, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy here is a port on which nobody listens."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    client = ServerClient(fake.url, api_key=KEY, patience=IMPATIENT)
    assert client.get("/model_info", seconds=5.0)["weight_version"] == "default"
    assert client.is_ready()
    client.close()
