"""Answers go in, futures of verdicts come out: what is safe by construction at once, algebra from workers."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
        self._kept: OrderedDict[Ask, Verdict] = OrderedDict()
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
        """Begin to check; the futures are in the order of ``asks``."""
        found: list[Future[Verdict]] = [Future() for _ in asks]
        waiting: dict[Ask, list[Future[Verdict]]] = {}
        for ask, future in zip(asks, found, strict=True):
            verdict = self._remembered(ask) or settle(ask)
            if verdict is None:
                waiting.setdefault(ask, []).append(future)
            else:
                self._give(future, verdict)
        answers = self._workers.submit([list(ask) for ask in waiting])
        for (ask, futures), answer in zip(waiting.items(), answers, strict=True):
            answer.add_done_callback(lambda done, ask=ask, futures=futures: self._answered(done, ask, futures))  # type: ignore[misc]
        return found

    def check(self, ask: Ask) -> Verdict:
        """One verdict, waited for."""
        return self.submit([ask])[0].result()

    def _remembered(self, ask: Ask) -> Verdict | None:
        with self._lock:
            verdict = self._kept.get(ask)
            if verdict is not None:
                self._kept.move_to_end(ask)
            return verdict

    def _answered(self, done: Future[Answer], ask: Ask, futures: list[Future[Verdict]]) -> None:
        error = done.exception()
        if error is not None:
            for future in futures:
                future.set_exception(error)
            return
        verdict = _verdict(done.result(), ask)
        if verdict.killed:
            self._tell(ask, verdict)
        with self._lock:
            self.counts["by worker"] += 1
            self._kept[ask] = verdict
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        for future in futures:
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
