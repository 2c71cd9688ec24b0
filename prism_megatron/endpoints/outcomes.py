"""What one try of a request to ``/chat/completions`` can come to, and how an answer is read.

An outcome tells a request that nobody answered from one that is refused as such, and from an endpoint that refuses
everything.
"""

from __future__ import annotations

import email.utils
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

_COME_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses that say nothing against the request; those from 520 on are of gateways."""


@dataclass(frozen=True)
class Answered:
    """An answer as the endpoint gave it; what it does not say is None."""

    text: str | None
    finish: str | None
    """why the answer ended: stop, length, or another reason of the endpoint's"""
    prompt_tokens: int | None
    answer_tokens: int | None


@dataclass(frozen=True)
class ComeAgain:
    """No answer, for a reason that another try may not meet."""

    problem: str
    retry_after: float | None = None
    """seconds that the endpoint asks to wait"""
    reached: bool = True
    """False where no connection came about, so that nothing was asked"""


@dataclass(frozen=True)
class Refused:
    """The endpoint cannot answer this request, or answers with what is no answer."""

    problem: str
    status: int | None = None
    """of HTTP; None where it was 200"""


@dataclass(frozen=True)
class Oversized:
    """The answer is longer than is read; its rest was left where it is."""

    problem: str


@dataclass(frozen=True)
class RefusesAll:
    """The endpoint takes no request of ours, because of the key, the model, or because it points elsewhere."""

    because: Literal["key", "model", "address"]
    problem: str


Outcome = Answered | ComeAgain | Refused | Oversized | RefusesAll


def unsuccessful(status: int, problem: str, retry_after: float | None) -> ComeAgain | Refused | RefusesAll:
    """What a status of HTTP other than 200 means."""
    if status in (401, 403):
        return RefusesAll("key", problem)
    if status == 404:
        return RefusesAll("model", problem)
    if 300 <= status < 400:
        return RefusesAll("address", problem)
    return ComeAgain(problem, retry_after) if status in _COME_AGAIN else Refused(problem, status)


def answer_in(body: bytes) -> Answered | Refused:
    """The answer that the body of a response with status 200 holds."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
        usage = answer.get("usage") or {}
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
        return Refused(f"the answer is not in the protocol ({type(error).__name__}: {error})")
    return Answered(
        text=_plain(text) if isinstance(text, str) else None,
        finish=None if finish is None else _plain(str(finish)),
        prompt_tokens=_count(usage, "prompt_tokens"),
        answer_tokens=_count(usage, "completion_tokens"),
    )


def retry_after(value: str | None, *, now: float) -> float | None:
    """Seconds to wait, told as such or as a date (RFC 9110, section 10.2.3); None for what is neither.

    ``now`` is in seconds since 1970.
    """
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


def _plain(text: str) -> str:
    """Half of a surrogate pair, which JSON can spell, is no text."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else None
