"""Answers go in, futures of verdicts come out: what is safe by construction at once, algebra from workers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Self

from prism_megatron.rewards.answers import plain
from prism_megatron.rewards.check import kind_of, settle
from prism_megatron.rewards.verdict import KILLED, Ask, GuardedError, Verdict
from prism_megatron.rewards.workers import Answer, Workers, WorkSettings

_KEPT = 20_000
_SAID = 5
_SHOWN_CHARACTERS = 40


class Checker:
    """Checks answers. A context manager; ``close`` ends its processes.

    The verdict of a pair that was checked by a worker is kept, so that what one rollout of a group burned a second on
    costs the next nothing. ``counts`` has the numbers of checks, of those right, by worker, guarded and killed.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        seconds: float = 1.0,
        memory_bytes: int = 2**30,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        """``seconds`` of a worker's CPU time, and ``memory_bytes``, are a check's limits. ``say`` is told of kills."""
        self._workers = Workers(
            WorkSettings(cpu_seconds=seconds, wall_seconds=30 * seconds, memory_bytes=memory_bytes), workers=workers
        )
        self._say = say
        self._kept: dict[Ask, Verdict] = {}
        self._waiting: dict[Ask, list[Future[Verdict]]] = {}
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; checks that wait raise RewardError."""
        self._workers.close()

    def submit(self, asks: Sequence[Ask]) -> list[Future[Verdict]]:
        """Begin to check; the futures are in the order of ``asks``. Raises RewardError where no worker can be had."""
        found: list[Future[Verdict]] = [Future() for _ in asks]
        new: list[Ask] = []
        for ask, future in zip(asks, found, strict=True):
            verdict = settle(ask)
            with self._lock:
                verdict = verdict or self._kept.get(ask)
                if verdict is None:
                    if ask not in self._waiting:
                        new.append(ask)
                    self._waiting.setdefault(ask, []).append(future)
            if verdict is not None:
                self._give(future, verdict)
        for ask, answer in zip(new, self._workers.submit([list(ask) for ask in new]), strict=True):
            answer.add_done_callback(partial(self._answered, ask=ask))
        return found

    def check(self, ask: Ask) -> Verdict:
        """One verdict, waited for."""
        return self.submit([ask])[0].result()

    def _answered(self, done: Future[Answer], *, ask: Ask) -> None:
        error = done.exception()
        verdict = None if error else _verdict(done.result(), ask)
        with self._lock:
            futures = self._waiting.pop(ask)
            if verdict is not None:
                self.counts["by worker"] += 1
                self._kept[ask] = verdict
                if len(self._kept) > _KEPT:
                    del self._kept[next(iter(self._kept))]
        if verdict is not None and verdict.killed:
            self._tell(ask, verdict)
        for future in futures:
            if verdict is None:
                future.set_exception(error)
            else:
                self._give(future, verdict)

    def _give(self, future: Future[Verdict], verdict: Verdict) -> None:
        with self._lock:
            self.counts["checks"] += 1
            for name, holds in (("right", verdict.right), ("guarded", verdict.guarded), ("killed", verdict.killed)):
                self.counts[name] += holds
        future.set_result(verdict)

    def _tell(self, ask: Ask, verdict: Verdict) -> None:
        with self._lock:
            self.counts["workers killed"] += 1
            told = self.counts["workers killed"]
        if told > _SAID:
            return
        shown = repr(ask.answer[:_SHOWN_CHARACTERS])[1:-1] + ("…" if len(ask.answer) > _SHOWN_CHARACTERS else "")
        last = "; further ones are counted" if told == _SAID else ""
        self._say(f"the check of an answer ({shown}) was {verdict.reason}; it counts as wrong{last}")


def _verdict(answer: Answer, ask: Ask) -> Verdict:
    if answer[0] == "done":
        return Verdict(*answer[1:])
    try:
        kind = kind_of(plain(ask.gold), ask.answer_type)
    except GuardedError:
        kind = "text"
    return Verdict(False, kind, 0.0, f"{KILLED}{answer[1]}")
