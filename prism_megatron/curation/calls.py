"""What is asked of a model, and what comes back: the words that all of curation shares.

A call is named by everything that it says (``Call.key``), so that an answer that is stored is never asked for again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Kind = Literal["answered", "refused", "unanswered", "oversized"]


@dataclass(frozen=True)
class Call:
    """One request to one model.

    Example: ``Call("teacher", {"model": "m", "messages": [...], "max_tokens": 64}, number=0)``.
    """

    role: str
    """whose endpoints it goes to: teacher, judge, disambiguator, or strong 0, strong 1, …"""
    body: Mapping[str, Any]
    """the whole request as it is sent, but for what an endpoint calls the model"""
    number: int = 0
    """of calls with one body, each of which is to have an answer of its own"""

    @property
    def key(self) -> str:
        """Hash of the request and its number: 64 hexadecimal digits. The role is not in it, nor who answers."""
        text = json.dumps([self.number, self.body], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Response:
    """What a call came to in the end; once stored it never changes."""

    kind: Kind
    """answered; refused as a request (4xx); unanswered after all tries; or longer than is read"""
    text: str = ""
    """the answer, or what was wrong"""
    finish: str = ""
    """why the answer ended: stop, length, or another reason of the endpoint's"""
    prompt_tokens: int = 0
    """as the endpoint counts them, 0 where it does not"""
    answer_tokens: int = 0
    cost: float = 0.0
    endpoint: str = ""
    """address of the one that answered"""
    tries: int = 1
    """that it took"""

    @property
    def answered(self) -> bool:
        return self.kind == "answered"


class Asker(Protocol):
    """Answers calls, from a store or from endpoints."""

    def ask(self, call: Call) -> Future[Response]:
        """Begin; the future raises PrismError where the curation cannot go on: a key that is refused, a cost that is
        spent, a disk that is full."""
        ...


def user_turn(texts: Sequence[str], image: str | None) -> dict[str, Any]:
    """A user's message: the image first, a data URL, then the texts."""
    shown = [] if image is None else [{"type": "image_url", "image_url": {"url": image}}]
    return {"role": "user", "content": [*shown, *({"type": "text", "text": text} for text in texts)]}
