"""One model in one role: it is asked, and what that took is noted."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prism_megatron.config.tools.curate import Model
from prism_megatron.curation.calls import Asker, Call, Response, user_turn

EXCERPT_CHARACTERS = 1000
"""Of a reply, that a note keeps for the page."""
_SEED_BITS = 31


@dataclass
class Spent:
    """What the answers of this command cost, those from the store too. Threads share it."""

    calls: int = 0
    cost: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, response: Response) -> None:
        with self._lock:
            self.calls += 1
            self.cost += response.cost


@dataclass(frozen=True)
class Said:
    """An answered call, or one that came to nothing."""

    role: str
    model: str
    number: int
    key: str
    prompt: str
    """version of the text that it was asked with"""
    response: Response

    def note(self, outcome: str, detail: str = "", *, excerpt: bool = False) -> dict[str, Any]:
        """For a row: who was asked, under which key the answer is stored, what it took, and what it came to."""
        response = self.response
        note = {
            "role": self.role,
            "model": self.model,
            "prompt": self.prompt,
            "number": self.number,
            "key": self.key,
            "outcome": outcome,
            "detail": detail,
            "prompt_tokens": response.prompt_tokens,
            "answer_tokens": response.answer_tokens,
            "cost": response.cost,
        }
        return note | ({"excerpt": response.text[:EXCERPT_CHARACTERS]} if excerpt else {})


class Speaker:
    """A model in a role. Threads share it."""

    def __init__(
        self,
        role: str,
        model: Model,
        *,
        asker: Asker,
        seed: int,
        spent: Spent,
        check_going_on: Callable[[], object] = lambda: None,
    ) -> None:
        """``check_going_on`` raises PrismError where nothing more is to be asked."""
        self.role, self.model = role, model
        self._asker, self._seed, self._spent, self._check_going_on = asker, seed, spent, check_going_on

    def call(self, texts: Sequence[str], image: str | None, number: int) -> Call:
        """The request with this number of those that ask the same."""
        model = self.model
        body = {
            "model": model.name,
            "messages": [user_turn(texts, image)],
            "max_tokens": model.max_tokens,
            "temperature": model.temperature,
            "top_p": model.top_p,
            "seed": seed_of(self._seed, number),
            **model.fields,
        }
        return Call(self.role, {name: value for name, value in body.items() if value is not None}, number)

    def begin(self, text: str, image: str | None, *, number: int, prompt: str) -> Callable[[], Said]:
        """Ask; what is returned waits for the answer. ``prompt`` is the version of the text.

        Raises what the asker's future raises, and at once where nothing more is to be asked.
        """
        self._check_going_on()
        call = self.call([text], image, number)
        future: Future[Response] = self._asker.ask(call)

        def wait() -> Said:
            response = future.result()
            self._spent.add(response)
            return Said(self.role, self.model.name, number, call.key, prompt, response)

        return wait

    def ask(self, text: str, image: str | None, *, number: int, prompt: str) -> Said:
        """Ask and wait. Raises as :meth:`begin`."""
        return self.begin(text, image, number=number, prompt=prompt)()


def seed_of(seed: int, number: int) -> int:
    """What a server that takes seeds draws answer ``number`` to any one request from; 31 bits."""
    digest = hashlib.blake2b(f"{seed}|{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % (1 << _SEED_BITS)
