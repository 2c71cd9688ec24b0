"""One try of a request: what it can come to, and how much of an endpoint's time and bytes it takes.

Blind spot: TLS.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prism_megatron.endpoints.chat import LIMIT_BYTES, ChatEndpoint, key_of, refuses_all_because
from prism_megatron.endpoints.loop import LoopThread
from prism_megatron.endpoints.outcomes import (
    Answered,
    ComeAgain,
    Outcome,
    Oversized,
    Refused,
    RefusesAll,
    retry_after,
)
from prism_megatron.errors import ConfigError

KEY = 'a-secret/"key"'
ANSWER = b'{"choices": [{"message": {"content": "four"}, "finish_reason": "stop"}]}'


@contextmanager
def raw_server(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """One that reads the head of a request and leaves the rest to ``serve``."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(30.0)

    def run() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(30.0)
            connection.recv(2**16)
            try:
                serve(connection)
            except OSError:
                return  # the client has left, as it should

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    thread.join(30.0)
    listening.close()
    assert not thread.is_alive(), "the connection was kept"


def sent(data: bytes, *, status: str = "200 OK", headers: str = "") -> Callable[[socket.socket], object]:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode()
    return lambda connection: connection.sendall(head + data)


def tried(url: str, *, seconds: float | None = None, silence_seconds: float = 20.0, limit_bytes: int = LIMIT_BYTES,
          body: dict[str, Any] | None = None) -> Outcome:  # fmt: skip
    async def once() -> Outcome:
        endpoint = ChatEndpoint(
            url, api_key=KEY, seconds=seconds, silence_seconds=silence_seconds, limit_bytes=limit_bytes
        )
        try:
            return await endpoint.try_once(body or {})
        finally:
            await endpoint.close()

    return asyncio.run(once())


def answer_of(data: bytes, **how: Any) -> Outcome:
    with raw_server(sent(data, **how)) as url:
        return tried(url)


def test_an_answer_is_read_with_all_that_it_says() -> None:
    assert answer_of(ANSWER) == Answered("four", "stop", None, None)
    told = (
        b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}], '
        b'"usage": {"prompt_tokens": 7, "completion_tokens": -1}}'
    )
    assert answer_of(told) == Answered(None, "length", 7, None)
    half = b'{"choices": [{"message": {"content": "a\\ud800b"}}], "usage": []}'
    assert answer_of(half) == Answered("a?b", None, None, None)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("429 Slow", ComeAgain("HTTP 429: so", 7.0)),
        ("503 Down", ComeAgain("HTTP 503: so", 7.0)),
        ("524 Gateway", ComeAgain("HTTP 524: so", 7.0)),
        ("400 Bad", Refused("HTTP 400: so", 400)),
        ("422 Bad", Refused("HTTP 422: so", 422)),
        ("501 None", Refused("HTTP 501: so", 501)),
        ("401 Key", RefusesAll("key", "HTTP 401: so")),
        ("403 Key", RefusesAll("key", "HTTP 403: so")),
        ("404 Model", RefusesAll("model", "HTTP 404: so")),
        ("307 Moved", RefusesAll("address", "HTTP 307: so")),
    ],
)
def test_every_status_means_one_thing(status: str, outcome: Outcome) -> None:
    """Claim: also a redirect, which is not followed: nobody listens where it leads."""
    assert answer_of(b"so", status=status, headers="Retry-After: 7\r\nLocation: http://127.0.0.1:9/v1\r\n") == outcome


@pytest.mark.parametrize(
    "data", [b"<html>", b"[]", b'{"choices": []}', b"1" * 5000, b"[" * 100_000, b'{"choices": [1]}', b"\xff"]
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    outcome = answer_of(data)
    assert isinstance(outcome, Refused) and outcome.status is None and "not in the protocol" in outcome.problem


def test_a_body_that_never_ends_is_cut() -> None:
    """Claim: an answer of 50 MB is left where it is after the limit, whether its length is told or not; no more of it
    is in memory, and an error's text is read no further than a complaint needs."""
    counts = []

    def endless(head: bytes) -> Callable[[socket.socket], object]:
        def serve(connection: socket.socket) -> None:
            counts.append(0)
            connection.sendall(head)
            for _ in range(800):
                connection.sendall(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
                counts[-1] += 2**16

        return serve

    heads = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 52428800\r\n\r\n",
        b"HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n",
    )
    tracemalloc.start()
    outcomes = []
    for head in heads:
        with raw_server(endless(head)) as url:
            outcomes.append(tried(url, limit_bytes=10**6))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcomes[:2] == [Oversized("the answer is longer than 1000000 bytes")] * 2
    assert outcomes[2] == Refused(f"HTTP 400: {'x' * 200}", 400)
    assert max(counts) < 25 * 10**6, "the rest was never sent: what fits into sockets is a few megabytes"
    assert peak < 15 * 10**6


def test_the_deadline_is_for_all_of_a_try() -> None:
    """Claim: an endpoint that says something again and again, and never all, is left: in its head or in its body."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            time.sleep(0.02)  # the server drips: how slowly does not matter, no more than it never ends
            connection.sendall(b"x")

    def drip_body(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            time.sleep(0.02)  # the server drips: how slowly does not matter, no more than it never ends
            connection.sendall(b"x")

    for serve in (drip, drip_body):
        with raw_server(serve) as url:
            began = time.monotonic()
            assert tried(url, seconds=0.3) == ComeAgain("no whole answer within 0.3 s")
            assert 0.3 <= time.monotonic() - began < 10.0


def test_a_connection_that_ends_early_is_told_from_none() -> None:
    """Claim: what was asked and not answered counts as reached; where nobody listens nothing was asked."""
    with raw_server(lambda connection: connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"ch')) as url:
        dropped = tried(url)
    assert isinstance(dropped, ComeAgain) and dropped.reached
    for address in (url, "ftp://127.0.0.1/v1", "http://[/v1"):
        outcome = tried(address)
        assert isinstance(outcome, ComeAgain) and not outcome.reached, outcome
    with raw_server(lambda connection: [*iter(lambda: connection.recv(100), b"")]) as url:
        silent = tried(url, silence_seconds=0.2)
    assert isinstance(silent, ComeAgain) and "ReadTimeout" in silent.problem


def test_no_outcome_holds_the_key() -> None:
    """Claim: neither as it is nor as JSON spells it, in complaints, answers or reasons."""
    spelled = KEY.replace('"', '\\"')
    echo = f'{{"choices": [{{"message": {{"content": "{spelled}"}}, "finish_reason": "{spelled}"}}]}}'.encode()
    for outcome in (
        answer_of(echo),
        answer_of(KEY.encode(), status="400 Bad"),
        answer_of(f'"{spelled}"'.encode(), status="500 Bad"),
        answer_of(b"x" * 795 + KEY.encode(), status="401 Bad"),
    ):
        assert "secret" not in str(outcome)


def test_a_short_key_is_no_secret_in_an_answer() -> None:
    """Claim: a local server's key such as ``four`` does not change what a model says."""

    async def once(url: str) -> Outcome:
        endpoint = ChatEndpoint(url, api_key="four", silence_seconds=20.0)
        try:
            return await endpoint.try_once({})
        finally:
            await endpoint.close()

    with raw_server(sent(ANSWER)) as url:
        assert asyncio.run(once(url)) == Answered("four", "stop", None, None)


def test_any_text_can_be_sent() -> None:
    """Claim: half of a surrogate pair too, as JSON spells it."""
    with raw_server(sent(ANSWER)) as url:
        assert isinstance(tried(url, body={"x": "\ud800 ☃"}), Answered)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now=70.0) == 30.0
    assert [retry_after(text, now=0.0) for text in (None, "soon", "inf", "-3", "1.5")] == [None, None, None, 0.0, 1.5]


def test_what_no_header_can_hold_is_no_key() -> None:
    """Claim: the end of a line is no part of a key; anything else that is not printable is refused, and not told."""
    assert key_of(" a-key\r\n", "VARIABLE") == "a-key"
    assert key_of("", "VARIABLE") is None
    for bad in ("a\rb", "schlüssel"):
        with pytest.raises(ConfigError, match="VARIABLE") as raised:
            key_of(bad, "VARIABLE")
        assert bad not in str(raised.value)


def test_a_refusal_of_all_says_what_to_do() -> None:
    said = [
        refuses_all_because(RefusesAll(because, "HTTP 4"), "http://a/v1", key="set K", model="name M")
        for because in ("key", "model", "address")
    ]
    assert (
        said[0].endswith("(HTTP 4); set K") and said[1].endswith("(HTTP 4); name M") and "points elsewhere" in said[2]
    )


def test_a_loop_ends_what_is_under_way() -> None:
    """Claim: closing waits for no task, runs what is to be run last, and leaves no thread."""
    before = threading.active_count()
    loop = LoopThread("a loop")
    ended = []

    async def last() -> None:
        ended.append("last")

    future = loop.start(asyncio.sleep(5.0))
    loop.close(last)
    loop.close(last)
    assert future.cancelled() and ended == ["last"] and threading.active_count() == before
    with pytest.raises(RuntimeError, match="a loop is closed"):
        loop.start(last())
