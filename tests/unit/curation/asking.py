"""Models, calls, and a program that asks them: ``python -m tests.unit.curation.asking URL STORE FIRST COUNT``.

The program prints one line for each response as soon as it has it: the problem and the response's kind.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from prism_megatron.config.tools.curate import Endpoint, Model
from prism_megatron.curation.calls import Call, Response, user_turn
from prism_megatron.curation.client.caller import Caller
from prism_megatron.curation.client.pace import Pace
from prism_megatron.curation.storage.store import Store
from tests.unit.curation.mock_teacher import Script

IMAGE = "data:image/png;base64,iVBORw0KGgo="
QUICK = Pace(first_pause=0.01, longest_pause=0.05, poll=0.01)


def model(*urls: str, seconds: float = 20.0, tries: int = 3, **endpoint: Any) -> Model:
    """The teacher at some addresses, of each of which the same holds."""
    return Model(
        name="teacher",
        endpoints=tuple(Endpoint(url=url, **endpoint) for url in urls),
        max_tokens=64,
        seconds=seconds,
        tries=tries,
    )


def call(problem: int, *, role: str = "teacher", number: int = 0, text: str = "") -> Call:
    """A call about a problem."""
    messages = [user_turn([f"[problem {problem}] How many? {text}"], IMAGE)]
    return Call(role, {"model": "teacher", "messages": messages, "max_tokens": 64}, number)


def caller(store: Store, *models: Model, environment: Mapping[str, str] | None = None, **settings: Any) -> Caller:
    """Of the teacher; of a judge too, where there is a second model."""
    named = dict(zip(("teacher", "judge"), models, strict=False))
    return Caller(store, named, seed=1, environment=environment or {}, **{"pace": QUICK, **settings})


def answers(asker: Caller, problems: range) -> list[Response]:
    """In order, all asked at once."""
    under_way: list[Future[Response]] = [asker.ask(call(problem)) for problem in problems]
    return [future.result(60.0) for future in under_way]


def main() -> None:
    url, path, first, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    store = Store(path)
    asker = caller(store, model(url, at_once=4, seconds=600.0))
    under_way = {problem: asker.ask(call(problem)) for problem in range(first, first + count)}
    for problem, future in under_way.items():
        print(problem, future.result().kind, flush=True)
    asker.close()
    store.close()


class Opened:
    """Stores and callers that are closed at the end of a test."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "store.sqlite"
        self._stores: list[Store] = []
        self._callers: list[Caller] = []

    def store(self) -> Store:
        self._stores.append(Store(self.path))
        return self._stores[-1]

    def caller(self, *models: Model, **settings: Any) -> Caller:
        self._callers.append(caller(self.store(), *models, **settings))
        return self._callers[-1]

    def close(self) -> None:
        for asker in self._callers:
            asker.close()
        for store in self._stores:
            store.close()


def only(behaviour: str) -> Script:
    return Script({behaviour: 1.0}, mends=0.0)


if __name__ == "__main__":
    main()
