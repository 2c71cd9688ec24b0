"""Groups of rollouts go in, futures of their rewards come out, while other groups are still being sampled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.errors import RewardError
from prism_megatron.rewards.checker import Checker
from prism_megatron.rewards.format import ReadResponse, read_response
from prism_megatron.rewards.presets import PRESETS, Reward, combine
from prism_megatron.rewards.user import RewardInput
from prism_megatron.rewards.verdict import KILLED, Ask, Verdict
from prism_megatron.rewards.workers import Answer, Workers, WorkSettings


@dataclass(frozen=True)
class Sampled:
    """One rollout to reward.

    Example: ``Sampled("q7", "How many?", "3", "<caption>…</answer>", ended=True, answer_type="integer")``.
    """

    id: str
    question: str
    gold: str
    response: str
    """without the end token"""
    ended: bool
    """whether the end token was sampled"""
    answer_type: str | None = None


@dataclass(frozen=True)
class Rewarded:
    """What became of one rollout."""

    reward: Reward
    read: ReadResponse
    verdict: Verdict
    """of the answer; with a user's function what that took, under the kind ``function``"""


class Rewarder:
    """Rewards rollouts as a configuration says. A context manager; ``close`` ends its processes."""

    def __init__(
        self, config: RewardsConfig, *, strict_format: bool = True, say: Callable[[str], object] = lambda _: None
    ) -> None:
        """With ``--reward`` its processes start here. Raises RewardError where there is no such function."""
        memory = int(config.reward_memory_gb * 2**30)
        self._preset, self._function, self._strict = PRESETS[config.reward_preset], config.reward, strict_format
        self.checker = Checker(
            workers=config.reward_workers, seconds=config.check_seconds, memory_bytes=memory, say=say
        )
        self._say = say
        self._callers: Workers | None = None
        if config.reward is not None:
            settings = WorkSettings(config.reward, None, config.reward_seconds, memory)
            self._callers = Workers(settings, workers=config.reward_workers)
            self._callers.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; groups that wait raise RewardError."""
        self.checker.close()
        if self._callers is not None:
            self._callers.close()

    def submit(self, group: Sequence[Sampled]) -> Future[list[Rewarded]]:
        """Begin to reward the rollouts of a prompt. The future raises RewardError where a user's function fails."""
        reads = [read_response(one.response, ended=one.ended, strict=self._strict) for one in group]
        rewarded: list[Future[Rewarded]] = [Future() for _ in group]
        if self._callers is None:
            asks = [Ask(read.answer, one.gold, one.answer_type) for one, read in zip(group, reads, strict=True)]
            waiting: Sequence[Future[Any]] = self.checker.submit(asks)
        else:
            inputs = [_input(one, read) for one, read in zip(group, reads, strict=True)]
            waiting = self._callers.submit([asdict(one) for one in inputs])
        for one, read, come, given in zip(group, reads, waiting, rewarded, strict=True):
            come.add_done_callback(partial(self._finish, one=one, read=read, given=given))
        return _all_of(rewarded)

    def _finish(self, come: Future[Any], *, one: Sampled, read: ReadResponse, given: Future[Rewarded]) -> None:
        try:
            if self._callers is None:
                verdict: Verdict = come.result()
                name, value = "accuracy", float(verdict.right)
            else:
                (value, verdict), name = self._called(come.result(), one), "reward"
        except RewardError as error:
            given.set_exception(error)
            return
        given.set_result(Rewarded(combine(self._preset, name=name, answer=value, valid=read.valid), read, verdict))

    def _called(self, answer: Answer, one: Sampled) -> tuple[float, Verdict]:
        """Number and verdict of a call. Raises RewardError where the function failed."""
        if answer[0] != "done":
            counts = self.checker.counts
            counts["calls ended"] += 1
            if counts["calls ended"] == 1:
                self._say(f"--reward {self._function} on record {one.id} was ended after {answer[1]}; it gives 0")
            return 0.0, Verdict(False, "function", 0.0, f"{KILLED}{answer[1]}")
        _, value, problem, seconds = answer
        if problem:
            raise RewardError(f"--reward {self._function}: on record {one.id} it {problem}")
        return value, Verdict(value > 0, "function", seconds)


def _input(one: Sampled, read: ReadResponse) -> RewardInput:
    return RewardInput(one.id, one.question, one.response, read.valid, read.answer, one.gold, one.answer_type)


def _all_of(parts: Sequence[Future[Rewarded]]) -> Future[list[Rewarded]]:
    """A future of all results in order, or of the first error."""
    whole: Future[list[Rewarded]] = Future()
    left, lock = len(parts), threading.Lock()

    def one_less(_: Future[Rewarded]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        error = next((part.exception() for part in parts if part.exception() is not None), None)
        if error is not None:
            whole.set_exception(error)
        else:
            whole.set_result([part.result() for part in parts])

    if not parts:
        whole.set_result([])
    for part in parts:
        part.add_done_callback(one_less)
    return whole
