"""HTTP to one SGLang server: deadlines, retries of calls that may be repeated, and one error for each way to fail.

The protocol is that of SGLang 0.5.23. Only this module sends anything; nothing here imports sglang.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from prism_megatron.errors import RolloutError

SHORTEST_SECONDS = 0.1
"""The least time that a call is given, however near its deadline is."""
CONNECT_SECONDS = 5.0
CONTROL_SECONDS = 60.0
_NUM_CHARACTERS_SHOWN = 300


@dataclass(frozen=True)
class Patience:
    """How long a server that does not answer is left alone, and how long it is asked at all, in seconds."""

    first_pause: float = 0.1
    """before a call is made again; each further pause is twice as long"""
    longest_pause: float = 2.0
    attach: float = 3.0
    """how long a server may take to answer for the first time"""


class ServerLostError(RolloutError):
    """The server could not be reached, or broke off: it may be gone, and what it was doing is not known."""


class ServerRefusedError(RolloutError):
    """The server answered with an error; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerClient:
    """One server's base URL and key. Threads may share it."""

    def __init__(self, url: str, *, api_key: str | None, patience: Patience | None = None) -> None:
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # Proxies of the environment are for the world outside; a server's weights and prompts must not pass them.
        self._http = httpx2.Client(
            base_url=self.url,
            headers=headers,
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=32),
        )

    def get(self, path: str, *, seconds: float = CONTROL_SECONDS) -> dict[str, Any]:
        """A read, repeated with growing pauses until it succeeds or ``seconds`` have passed. Raises as ``post``."""
        return _object(self._patiently("GET", path, {}, seconds), f"{self.url}{path}")

    def get_once(self, path: str, *, seconds: float = CONNECT_SECONDS) -> dict[str, Any]:
        """A read, made once. Raises as ``post``."""
        return _object(self._once("GET", path, {}, seconds), f"{self.url}{path}")

    def post_again(self, path: str, body: Mapping[str, Any], *, seconds: float = CONTROL_SECONDS) -> dict[str, Any]:
        """A call that may be made twice without harm, repeated as ``get``. Raises as ``post``."""
        return _object(self._patiently("POST", path, {"json": body}, seconds), f"{self.url}{path}")

    def post(self, path: str, body: Mapping[str, Any], *, seconds: float = CONTROL_SECONDS) -> Any:
        """A call made once. Returns the parsed answer.

        Raises ServerLostError when no answer comes in ``seconds`` or the connection breaks, ServerRefusedError for an
        HTTP error, and RolloutError for an answer that is no JSON.
        """
        return self._once("POST", path, {"json": body}, seconds)

    def post_stream(self, path: str, body: tuple[Iterator[bytes], int], *, seconds: float = CONTROL_SECONDS) -> Any:
        """As ``post``, with the chunks of a JSON text and its length."""
        chunks, length = body
        headers = {"Content-Type": "application/json", "Content-Length": str(length)}
        return self._once("POST", path, {"content": chunks, "headers": headers}, seconds)

    def is_ready(self, path: str = "/health") -> bool:
        """Whether the server takes requests now, asked at ``path``. Never raises."""
        try:
            return self._http.get(path, timeout=CONNECT_SECONDS).status_code == 200
        except httpx2.TransportError:
            return False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _patiently(self, method: str, path: str, content: Mapping[str, Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        pause = self.patience.first_pause
        while True:
            try:
                return self._once(method, path, content, max(deadline - time.monotonic(), SHORTEST_SECONDS))
            except ServerLostError:
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, self.patience.longest_pause)

    def _once(self, method: str, path: str, content: Mapping[str, Any], seconds: float) -> Any:
        timeout = httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
        where = f"{self.url}{path}"
        try:
            response = self._http.request(method, path, timeout=timeout, **content)
        except httpx2.TimeoutException as error:
            raise ServerLostError(f"{where} did not answer in {seconds:.0f} s; is the server overloaded?") from error
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise ServerLostError(f"{self.url} cannot be reached ({error}); is the server running there?") from error
        if response.status_code in (401, 403):
            raise ServerRefusedError(
                f"{self.url} refuses the API key (HTTP {response.status_code}); give the one it was started with",
                response.status_code,
            )
        if response.status_code != 200:
            raise ServerRefusedError(
                f"{where} answers HTTP {response.status_code}: {_complaint(response.text)}", response.status_code
            )
        try:
            return response.json()
        except (ValueError, RecursionError) as error:
            raise RolloutError(f"{where} answers with no JSON: {response.text[:_NUM_CHARACTERS_SHOWN]!r}") from error


def _object(answer: Any, where: str) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise RolloutError(f"{where} answers with a {type(answer).__name__} where an object was expected")
    return answer


def _complaint(text: str) -> str:
    """What the server says is wrong, out of any of the three forms in which it says it."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = text
    if isinstance(parsed, dict):
        parsed = parsed.get("error", parsed.get("message", parsed))
    if isinstance(parsed, dict):
        parsed = parsed.get("message", parsed)
    return " ".join(str(parsed).split())[:_NUM_CHARACTERS_SHOWN]
