"""A teacher over HTTP that fails in every way, at stated rates, and knows what it did.

What it does to a request depends on the request alone, so that a run that is killed and goes on meets the same teacher.
The one exception are failures that pass: a request that meets one is sent back ``passing`` times, and then answered.

A request names its problem by ``[problem 17]`` in its text. The right answer to problem 17 is ``gold(17)``; one that is
told the right answer has it anywhere in its text.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SAYING = ("right", "helped", "wrong", "truncated", "broken", "hollow", "empty", "foreign", "repeats")
"""Behaviours that are answers: ``helped`` is right if it is told the right answer, and wrong otherwise."""
PASSING = ("busy", "stumbles", "drops", "late")
"""Failures that pass: 429 with Retry-After, 500, a connection that ends inside the body, and silence."""
LASTING = ("down", "lost", "silent", "refused", "endless", "moved", "forbidden", "missing")
"""Failures of every try: 500, a connection that ends inside the body, silence, 400, a body of 50 MB, a redirect to
another host, 401, 404."""
RATES = {
    "helped": 0.10,
    "wrong": 0.06,
    "truncated": 0.04,
    "broken": 0.04,
    "hollow": 0.02,
    "empty": 0.02,
    "foreign": 0.02,
    "repeats": 0.02,
    "busy": 0.03,
    "stumbles": 0.03,
    "drops": 0.03,
    "late": 0.01,
    "down": 0.01,
    "lost": 0.01,
    "silent": 0.01,
    "refused": 0.02,
    "endless": 0.005,
}
"""Shares of problems; the rest is answered right."""
ENDLESS_BYTES = 50 * 10**6
_MARK = re.compile(r"\[problem (\d+)\]")
_FAULTS = ("truncated", "broken", "hollow", "empty", "foreign", "repeats")
_PIECE = b"x" * 2**16


def gold(problem: int) -> str:
    """The right answer to a problem."""
    return str(70000 + problem)


def text_of(body: Mapping[str, Any]) -> str:
    """All text of a request."""
    found = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(found)


def digest_of(body: Mapping[str, Any]) -> str:
    """Names a request by all that it says."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def draw(*names: object) -> float:
    """A number from 0 to 1 that belongs to the names."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, names)).encode()).digest()[:8], "big") / 2**64


def demonstration(answer: str, problem: int) -> str:
    """An answer in the form that is asked for."""
    return (
        f"<caption>\nA picture of problem {problem}.\n</caption>\n<think>\nCounting gives {answer}.\n</think>\n"
        f"<answer>{answer}</answer>"
    )


@dataclass(frozen=True)
class Plan:
    """What is done to a request."""

    problem: int
    behaviour: str
    told: bool
    """the right answer stands in it"""
    answer: str
    """what is said, where anything is"""
    finish: str = "stop"

    @property
    def is_right(self) -> bool:
        """Whether the answer, once it comes, is whole, in the asked form and right."""
        return self.answer == demonstration(gold(self.problem), self.problem)


@dataclass(frozen=True)
class Script:
    """What the teacher does to which problem."""

    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    seed: int = 0
    mends: float = 0.5
    """share of the problems with a fault in the answer whose every request draws anew whether it has the fault, which
    half of them have; requests that say the same have the same"""

    def behaviour_of(self, problem: int) -> str:
        """What the problem meets; ``right`` for what no rate says."""
        left = draw(self.seed, "behaviour", problem)
        for behaviour, rate in self.rates.items():
            if left < rate:
                return behaviour
            left -= rate
        return "right"

    def plan(self, body: Mapping[str, Any]) -> Plan:
        """What is done to a request to the teacher."""
        text = text_of(body)
        marked = _MARK.search(text)
        assert marked, f"a request without [problem N]: {text[:200]!r}"
        problem = int(marked.group(1))
        told = gold(problem) in text
        behaviour = self.behaviour_of(problem)
        if behaviour in _FAULTS and draw(self.seed, "mends", problem) < self.mends:
            behaviour = behaviour if draw(self.seed, "fault", digest_of(body)) < 0.5 else "right"
        return Plan(problem, behaviour, told, *_said(behaviour, problem, told=told))


def _said(behaviour: str, problem: int, *, told: bool) -> tuple[str, str]:
    """What is said, and why it ends."""
    right = demonstration(gold(problem), problem)
    wrong = demonstration(str(90000 + problem), problem)
    texts = {
        "wrong": (wrong, "stop"),
        "helped": (right if told else wrong, "stop"),
        "truncated": (right[: len(right) // 2], "length"),
        "broken": (right.replace("</caption>\n<think>", ""), "stop"),
        "hollow": (demonstration(gold(problem), problem).replace(f"Counting gives {gold(problem)}.", " "), "stop"),
        "empty": ("", "stop"),
        "foreign": (f"这是第{problem}题。图中的物体无法数清，答案不明。", "stop"),
        "repeats": (right.partition("</think>")[0] + f"Counting gives {gold(problem)}.\n" * 200, "length"),
    }
    return texts.get(behaviour, (right, "stop"))


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    at: float
    """seconds of the monotonic clock"""
    model: str
    problem: int | None
    behaviour: str
    told: bool
    digest: str
    status: int
    """of HTTP; 0 where nothing was sent, or not all"""


@dataclass
class MockTeacher:
    """A running server."""

    script: Script
    others: Mapping[str, Callable[[str], str]]
    """what models other than the teacher say, by their names: from the text of a request"""
    retry_after: str
    passing: int
    seconds: float
    """that an answer takes"""
    silence_seconds: float
    url: str = ""
    log: list[Asked] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    bytes_sent: int = 0
    most_at_once: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    _now: int = 0
    _tries: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, handler: _Handler, body: Mapping[str, Any], key: str | None) -> None:
        """Keep a request and do what the script says."""
        at, digest, model = time.monotonic(), digest_of(body), str(body.get("model"))
        other = self.others.get(model)
        plan = None if other else self.script.plan(body)
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.keys.add(key)
            passed = self._tries[digest] >= self.passing
            self._tries[digest] += 1
        behaviour = "right" if plan is None or (plan.behaviour in PASSING and passed) else plan.behaviour
        status = _STATUS.get(behaviour, 200)
        with self._lock:
            self.log.append(
                Asked(
                    at=at,
                    model=model,
                    problem=None if plan is None else plan.problem,
                    behaviour=behaviour,
                    told=plan is not None and plan.told,
                    digest=digest,
                    status=status,
                )
            )
        try:
            if self.seconds:
                self.ended.wait(self.seconds)
            answer, finish = (plan.answer, plan.finish) if plan else (other(text_of(body)) if other else "", "stop")
            with suppress(ConnectionError):
                self._do(handler, behaviour, answer, finish, body)
        finally:
            with self._lock:
                self._now -= 1

    def times(self) -> list[float]:
        """When requests came, in order."""
        return sorted(asked.at for asked in list(self.log))

    def _do(self, handler: _Handler, behaviour: str, answer: str, finish: str, body: Mapping[str, Any]) -> None:
        if behaviour in ("late", "silent"):
            self.ended.wait(self.silence_seconds)
            handler.close_connection = True
            return
        if behaviour == "endless":
            handler.send_head(200, {"Content-Length": str(ENDLESS_BYTES)})
            for _ in range(ENDLESS_BYTES // len(_PIECE)):
                handler.wfile.write(_PIECE)
                self.bytes_sent += len(_PIECE)
            handler.close_connection = True
            return
        if behaviour in ("drops", "lost"):
            handler.send_head(200, {"Content-Length": "1000"})
            handler.wfile.write(b'{"choices": [')
            handler.close_connection = True
            return
        status = _STATUS.get(behaviour, 200)
        headers = {"busy": {"Retry-After": self.retry_after}, "moved": {"Location": "http://127.0.0.2:9/v1"}}
        sent = _completion(answer, finish, body) if status == 200 else {"error": {"message": f"{behaviour} here"}}
        handler.send_json(status, headers.get(behaviour, {}), sent)


_STATUS = {
    "busy": 429,
    "stumbles": 500,
    "down": 500,
    "refused": 400,
    "moved": 302,
    "forbidden": 401,
    "missing": 404,
    "drops": 0,
    "lost": 0,
    "late": 0,
    "silent": 0,
    "endless": 0,
}


def _completion(answer: str, finish: str, body: Mapping[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer}
    usage = {"prompt_tokens": len(text_of(body)) // 4, "completion_tokens": len(answer) // 4}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    teacher: MockTeacher

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            self.teacher.take(self, body, self.headers.get("Authorization"))
        else:
            self.send_json(404, {}, {"error": {"message": f"no {self.path}"}})

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_json(self, status: int, headers: Mapping[str, str], sent: Any) -> None:
        data = json.dumps(sent).encode()
        self.send_head(status, {**headers, "Content-Length": str(len(data))})
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        """A client that was killed ends its connections; that is no error here."""


@contextmanager
def mock_teacher(
    script: Script | None = None,
    *,
    others: Mapping[str, Callable[[str], str]] | None = None,
    retry_after: str = "0.2",
    passing: int = 1,
    seconds: float = 0.0,
    silence_seconds: float = 60.0,
) -> Iterator[MockTeacher]:
    """A teacher on loopback for as long as the context lasts; ``silence_seconds`` is how long it holds a connection on
    which it says nothing."""
    teacher = MockTeacher(script or Script(), others or {}, retry_after, passing, seconds, silence_seconds)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"teacher": teacher}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    teacher.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield teacher
    finally:
        teacher.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
