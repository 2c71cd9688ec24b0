"""Generation through an sglang-router, everything else straight to the servers behind it.

The router is a small HTTP proxy that takes servers in turn, as ``round_robin`` does, and knows no other calls than the
real one (0.3.2) passes on. Blind to the real router's retries, queues and health checks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path

import httpx2
import pytest

from prism_megatron.errors import RolloutError
from tests.unit.rollout.attached import attached, draw
from tests.unit.rollout.fake_sglang import FakeSGLang, running
from tests.unit.rollout.weights import mini_weights


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(image_token_id=498)) for _ in range(2)]


@contextmanager
def router(fakes: list[FakeSGLang], *, ready: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and the paths that it was asked for."""
    turns = cycle(fakes)
    asked: list[str] = []
    onwards = httpx2.Client(trust_env=False)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(200 if ready and self.path == "/readiness" else 503, b"OK")

        def do_POST(self) -> None:
            asked.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/generate":
                self.respond(404, b"{}")
                return
            answer = onwards.post(
                f"{next(turns).url}/generate",
                content=body,
                headers={"Authorization": self.headers["Authorization"], "Content-Type": "application/json"},
            )
            self.respond(answer.status_code, answer.content)

        def respond(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        onwards.close()


def test_only_generation_goes_through_the_router(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    with router(fakes) as (url, asked):
        engine = attached(fakes, tmp_path, router=url)
        engine.update_weights(mini_weights(2.0), 3)
        groups = draw(engine, count=8, n=2)
        engine.close()
    assert {rollout.policy_version for group in groups for rollout in group} == {3}
    assert asked == ["/generate"] * 8
    assert [fake.paths().count("/generate") for fake in fakes] == [4, 4]
    for fake in fakes:
        assert fake.version == "3" and "/update_weights_from_tensor" in fake.paths()


def test_an_answer_of_other_weights_is_asked_for_again(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    """The router may know a server that came back, or one that is not ours: its answers carry another version."""
    with router(fakes) as (url, asked):
        engine = attached(fakes, tmp_path, router=url)
        engine.update_weights(mini_weights(1.0), 3)
        fakes[0].restart()
        groups = draw(engine, count=3)
        fakes[1].restart()
        with pytest.raises(RolloutError, match="sampled with other weights than version 3"):
            draw(engine)
        engine.close()
    assert {rollout.policy_version for group in groups for rollout in group} == {3}
    assert len(asked) > 3


@pytest.mark.parametrize("failure", [0, 408, 503])
def test_what_the_router_gives_up_on_is_asked_again(failure: int, fakes: list[FakeSGLang], tmp_path: Path) -> None:
    with router(fakes) as (url, _):
        engine = attached(fakes, tmp_path, router=url)
        engine.update_weights(mini_weights(1.0), 1)
        fakes[0].answer_status = [failure]
        groups = draw(engine, count=4, n=3)
        engine.close()
    assert [len(group) for group in groups] == [3] * 4


def test_a_router_without_servers_is_refused_at_once(fakes: list[FakeSGLang], tmp_path: Path) -> None:
    with router(fakes, ready=False) as (url, _), pytest.raises(RolloutError, match=f"--rollout-router {url} does not"):
        attached(fakes, tmp_path, router=url)
    with pytest.raises(RolloutError, match="does not answer, or has no healthy worker"):
        attached(fakes, tmp_path, router=url)
