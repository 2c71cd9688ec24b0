"""One request to an OpenAI-compatible ``/chat/completions``, tried as often as it may be, and what its answer means.

A request that nobody answered is told apart from one that was refused, and from an endpoint that refuses everything.
"""

from __future__ import annotations

import email.utils
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from prism_megatron.config.tools.evaluate import API_KEY
from prism_megatron.errors import ConfigError, RolloutError

_CONNECT_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_COME_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_NUM_CHARACTERS_SHOWN = 200


class UnansweredError(RolloutError):
    """No try of a request got an answer."""


class RefusedError(RolloutError):
    """The endpoint answered that it cannot answer this request, or with something that is no answer.

    ``http_status`` is what it refused with; None where it answered.
    """

    def __init__(self, message: str, http_status: int | None = None) -> None:
        """``message`` is what it said."""
        super().__init__(message)
        self.http_status = http_status


@dataclass(frozen=True)
class Reply:
    """An answer as the endpoint gave it. Lengths are None where it does not say them."""

    text: str
    truncated: bool
    tokens: int | None
    prompt_tokens: int | None


class ChatClient:
    """One endpoint. Threads may share it; ``give_up`` makes all of them stop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        seconds: float,
        attempts: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``seconds`` bounds the silence within a request, and a Retry-After; ``clock`` gives seconds since 1970."""
        self.url = url.rstrip("/")
        self._api_key, self._seconds, self._attempts, self._clock = api_key, seconds, attempts, clock
        self._gone = threading.Event()
        # No proxies and no .netrc of the environment: a key comes from its variable, or not at all.
        self._http = httpx2.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            trust_env=False,
            timeout=httpx2.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=None),
        )

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """The answer to a request.

        Raises UnansweredError where no try got one, RefusedError where this request alone has none, ConfigError where
        the endpoint takes no request of ours.
        """
        pause = _FIRST_PAUSE
        for attempt in range(1, self._attempts + 1):
            try:
                response = self._http.post(f"{self.url}/chat/completions", json=dict(body))
            except (httpx2.TransportError, httpx2.InvalidURL) as error:
                problem, wait = f"it cannot be reached ({type(error).__name__}: {error})", pause
            else:
                if response.status_code == 200:
                    return self._reply(response)
                problem = f"HTTP {response.status_code}: {self._complaint(response)}"
                self._check_status(response.status_code, problem)
                told = _retry_after(response.headers.get("Retry-After"), now=self._clock())
                if told is not None and told > self._seconds:
                    raise UnansweredError(f"{self.url}: {problem}; it asks to wait {told:.0f} s, more than "
                                          f"--request-seconds {self._seconds:g}")  # fmt: skip
                wait = pause if told is None else told
            if attempt == self._attempts or self._gone.wait(wait):
                break
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise UnansweredError(f"{self.url} gave no answer in {attempt} tries; the last time: {self._hidden(problem)}")

    def give_up(self) -> None:
        """Have requests that wait for their next try end as unanswered."""
        self._gone.set()

    def close(self) -> None:
        """Close the connections."""
        self.give_up()
        self._http.close()

    def _check_status(self, status: int, problem: str) -> None:
        if status in (401, 403):
            raise ConfigError(f"{self.url} refuses the key ({problem}); set {API_KEY} to one that it takes")
        if status == 404:
            raise ConfigError(f"{self.url} has no such model, or no /chat/completions ({problem}); see --served-model")
        if 300 <= status < 400:
            raise ConfigError(f"{self.url} points elsewhere ({problem}); name the address that it points to")
        if status not in _COME_AGAIN:
            raise RefusedError(problem, status)

    def _reply(self, response: httpx2.Response) -> Reply:
        try:
            answer = response.json()
            choice = answer["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            usage = answer.get("usage") or {}
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise RefusedError(f"the answer is not in the protocol ({type(error).__name__}: {error})") from error
        if reason not in ("stop", "length"):
            raise RefusedError(f"the answer ended for the reason {self._hidden(str(reason))!r}")
        if not isinstance(text, str):
            raise RefusedError("the answer has no text")
        # Half of a surrogate pair, which JSON can spell, is no text.
        text = text.encode("utf-8", errors="replace").decode("utf-8")
        return Reply(text, reason == "length", _count(usage, "completion_tokens"), _count(usage, "prompt_tokens"))

    def _complaint(self, response: httpx2.Response) -> str:
        # Half of a key that is cut could not be found any more.
        return " ".join(self._hidden(response.text)[: 4 * _NUM_CHARACTERS_SHOWN].split())[:_NUM_CHARACTERS_SHOWN]

    def _hidden(self, text: str) -> str:
        """What an endpoint says may hold the key that it was sent."""
        return text if not self._api_key else text.replace(self._api_key, "…")


def _count(usage: object, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else None


def _retry_after(value: str | None, *, now: float) -> float | None:
    """Seconds to wait, told as such or as a date (RFC 9110, section 10.2.3); None for what is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
