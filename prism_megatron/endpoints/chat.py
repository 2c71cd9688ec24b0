"""One try of one request to an OpenAI-compatible ``/chat/completions``; whoever calls decides about another.

What comes back is read up to a limit and within a deadline, whatever the endpoint does: it may be broken, or hostile.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx2

from prism_megatron.endpoints.outcomes import (
    Answered,
    ComeAgain,
    Outcome,
    Oversized,
    RefusesAll,
    answer_in,
    retry_after,
    unsuccessful,
)
from prism_megatron.errors import ConfigError

LIMIT_BYTES = 4 * 2**20
"""Of an answer, by default: 20 times what a model says in 32,000 tokens, and as many more with their probabilities."""
_COMPLAINT_BYTES = 2**16
_CONNECT_SECONDS = 10.0
_NUM_CHARACTERS_SHOWN = 200
_SHORTEST_SECRET = 8
"""Local servers are given keys such as EMPTY, which no answer need be kept from saying."""


class ChatEndpoint:
    """An endpoint and its connections, which belong to the event loop that first uses them."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        silence_seconds: float,
        seconds: float | None = None,
        limit_bytes: int = LIMIT_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``silence_seconds`` bounds the time in which nothing is heard, and ``seconds`` all of a try; None bounds it
        not. ``clock`` gives seconds since 1970."""
        self.url = url.rstrip("/")
        self._api_key, self._seconds, self._limit, self._clock = api_key, seconds, limit_bytes, clock
        # No proxies and no .netrc of the environment: a key comes from its variable, or not at all.
        self._http = httpx2.AsyncClient(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            trust_env=False,
            follow_redirects=False,
            timeout=httpx2.Timeout(silence_seconds, connect=min(silence_seconds, _CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=None),
        )

    async def try_once(self, body: Mapping[str, Any]) -> Outcome:
        """Send a request and take its answer; no outcome holds the key."""
        try:
            async with asyncio.timeout(self._seconds):
                return await self._sent(json.dumps(body, separators=(",", ":")).encode())
        except TimeoutError:
            return ComeAgain(f"no whole answer within {self._seconds:g} s")
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            return ComeAgain(self._unheard(error), reached=False)
        except httpx2.RequestError as error:
            return ComeAgain(self._unheard(error))

    async def close(self) -> None:
        """Close the connections, in the loop that used them."""
        await self._http.aclose()

    async def _sent(self, content: bytes) -> Outcome:
        request = self._http.stream(
            "POST", f"{self.url}/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        async with request as response:
            if response.status_code != 200:
                said, _ = await _read(response, _COMPLAINT_BYTES)
                wait = retry_after(response.headers.get("Retry-After"), now=self._clock())
                problem = f"HTTP {response.status_code}: {self._complaint(said)}"
                return unsuccessful(response.status_code, problem, wait)
            answer, whole = await _read(response, self._limit)
        if not whole:
            return Oversized(f"the answer is longer than {self._limit} bytes")
        outcome = answer_in(answer)
        if isinstance(outcome, Answered):
            return replace(outcome, text=self._kept_secret(outcome.text), finish=self._kept_secret(outcome.finish))
        return replace(outcome, problem=self._hidden(outcome.problem))

    def _unheard(self, error: Exception) -> str:
        return self._hidden(f"it cannot be reached ({type(error).__name__}: {error})")

    def _complaint(self, said: bytes) -> str:
        # Half of a key that is cut could not be found any more.
        text = self._hidden(said.decode("utf-8", errors="replace"))
        return " ".join(text[: 4 * _NUM_CHARACTERS_SHOWN].split())[:_NUM_CHARACTERS_SHOWN]

    def _kept_secret(self, text: str | None) -> str | None:
        return text if text is None or len(self._api_key or "") < _SHORTEST_SECRET else self._hidden(text)

    def _hidden(self, text: str) -> str:
        """What an endpoint says may hold the key that it was sent, as it is or as JSON spells it."""
        if not self._api_key:
            return text
        for spelled in (self._api_key, json.dumps(self._api_key)[1:-1]):
            text = text.replace(spelled, "…")
        return text


def refuses_all_because(outcome: RefusesAll, url: str, *, key: str, model: str) -> str:
    """What is wrong and what to do; ``key`` and ``model`` say how these are set."""
    if outcome.because == "key":
        return f"{url} refuses the key ({outcome.problem}); {key}"
    if outcome.because == "model":
        return f"{url} has no such model, or no /chat/completions ({outcome.problem}); {model}"
    return f"{url} points elsewhere ({outcome.problem}); name the address that it points to"


def key_of(told: str, variable: str) -> str | None:
    """The key as it is sent, of what the variable holds; None for nothing.

    Raises ConfigError, which does not say the key, for one that no header can hold.
    """
    key = told.strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{variable} holds what is no key: characters that are not printable ASCII; set it anew")
    return key or None


async def _read(response: httpx2.Response, limit: int) -> tuple[bytes, bool]:
    """The first bytes of a body, at most ``limit``, and whether they are all."""
    held = bytearray()
    async for part in response.aiter_bytes():
        held += part
        if len(held) > limit:
            return bytes(held[:limit]), False
    return bytes(held), True
