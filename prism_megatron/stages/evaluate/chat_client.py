"""One request to an endpoint, tried as often as it may be.

A request that nobody answered is told apart from one that was refused, and from an endpoint that refuses everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from prism_megatron.config.tools.evaluate import API_KEY
from prism_megatron.endpoints.chat import ChatEndpoint, refuses_all_because
from prism_megatron.endpoints.loop import LoopThread
from prism_megatron.endpoints.outcomes import Answered, ComeAgain, Outcome, Oversized, Refused, RefusesAll
from prism_megatron.errors import ConfigError, RolloutError

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


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
        self._endpoint = ChatEndpoint(url, api_key=api_key, silence_seconds=seconds, clock=clock)
        self.url = self._endpoint.url
        self._seconds, self._attempts = seconds, attempts
        self._gone = threading.Event()
        self._loop = LoopThread("requests of an evaluation")

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """The answer to a request.

        Raises UnansweredError where no try got one, RefusedError where this request alone has none, ConfigError where
        the endpoint takes no request of ours.
        """
        pause, problem = _FIRST_PAUSE, ""
        for attempt in range(1, self._attempts + 1):
            outcome = self._try_once(body)
            if not isinstance(outcome, ComeAgain):
                return self._reply(outcome)
            problem, told = outcome.problem, outcome.retry_after
            if told is not None and told > self._seconds:
                raise UnansweredError(
                    f"{self.url}: {problem}; it asks to wait {told:.0f} s, more than --request-seconds "
                    f"{self._seconds:g}"
                )
            if attempt == self._attempts or self._gone.wait(pause if told is None else told):
                break
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise UnansweredError(f"{self.url} gave no answer in {attempt} tries; the last time: {problem}")

    def give_up(self) -> None:
        """Have requests that wait for their next try end as unanswered."""
        self._gone.set()

    def close(self) -> None:
        """Give up, end requests that are under way, and close the connections."""
        self.give_up()
        self._loop.close(self._endpoint.close)

    def _try_once(self, body: Mapping[str, Any]) -> Outcome:
        try:
            return self._loop.start(self._endpoint.try_once(body)).result()
        except CancelledError:
            return ComeAgain("it was given up")

    def _reply(self, outcome: Answered | Refused | Oversized | RefusesAll) -> Reply:
        if isinstance(outcome, RefusesAll):
            key, model = f"set {API_KEY} to one that it takes", "see --served-model"
            raise ConfigError(refuses_all_because(outcome, self.url, key=key, model=model))
        if not isinstance(outcome, Answered):
            raise RefusedError(outcome.problem, outcome.status if isinstance(outcome, Refused) else None)
        if outcome.finish not in ("stop", "length"):
            raise RefusedError(f"the answer ended for the reason {outcome.finish!r}")
        if outcome.text is None:
            raise RefusedError("the answer has no text")
        return Reply(outcome.text, outcome.finish == "length", outcome.answer_tokens, outcome.prompt_tokens)
