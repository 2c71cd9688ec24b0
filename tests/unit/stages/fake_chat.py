"""An HTTP server that speaks as much of OpenAI's chat completions as an evaluation uses, with its failures."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Respond = Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]
"""From the body of a request to status, headers and what is sent: text as it is, anything else as JSON."""


def always(status: int, headers: dict[str, str], sent: Any) -> Respond:
    """The same to every request."""
    return lambda _body: (status, headers, sent)


def answer(text: str | None, *, reason: str = "stop", usage: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A completion."""
    message = {"role": "assistant", "content": text}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": dict(usage or {})}


def question_of(body: dict[str, Any]) -> str:
    """The text that a request asks."""
    (text,) = [part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text"]
    assert isinstance(text, str)
    return text


def image_of(body: dict[str, Any]) -> Image.Image:
    """The picture that a request shows."""
    (url,) = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@dataclass
class FakeChat:
    """What the server was sent, and how it answers."""

    respond: Respond
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, body: dict[str, Any], key: str | None) -> tuple[int, dict[str, str], Any]:
        """Keep a request, and answer it."""
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.respond(body)
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def fake_chat(respond: Respond) -> Iterator[FakeChat]:
    """A server on loopback for as long as the context lasts."""
    chat = FakeChat(respond)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            headers: dict[str, str] = {}
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                status, sent = 404, {"error": {"message": f"no {self.path}"}}
            else:
                status, headers, sent = chat.take(body, self.headers.get("Authorization"))
            data = sent.encode() if isinstance(sent, str) else json.dumps(sent).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
