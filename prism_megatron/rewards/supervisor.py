"""The process between a run and one of its checking workers: forks it, sees it end, and forks the next.

It is started afresh (``rewards/workers.py``), so that it and what it forks hold no torch, no CUDA and no thread of the
run. It imports sympy, and a user's function, once; a worker is a fork of it, ready in milliseconds. A worker's clock is
its own CPU time: the kernel ends it, inside C code too, and neither waiting in a queue nor a busy host
counts. Hanging without using the CPU ends by a wall clock here.

Lines of JSON go in and out: what a hostile answer made of a worker can say no more than a verdict.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

Work = Callable[[Any], list[Any]]
"""What a worker does with one item; both are JSON."""

_PR_SET_PDEATHSIG = 1
_ENDS_OUT_OF_MEMORY = 77
_POLL_SECONDS = 1.0
_ITEMS_OF_A_WORKER = 2000
_WARM_UP = (
    r"\frac{\sqrt{12}}{2x}+3\pi",
    r"e^{x^2}\sin x",
    r"\{1, 2\}",
    r"[\sqrt{2}, \infty)",
    "x<2",
    "y=2x-1",
    r"\ln 2",
)


@dataclass(frozen=True)
class Limits:
    """Of one item."""

    cpu_seconds: float | None
    wall_seconds: float
    memory_bytes: int


class _Worker:
    """A forked process with a pipe each way."""

    def __init__(self, work: Work, limits: Limits, *, closes: tuple[int, ...]) -> None:
        items, self.sends = os.pipe()
        self.receives, answers = os.pipe()
        self.num_done = 0
        self.process = os.fork()
        if self.process == 0:
            try:
                for descriptor in (self.sends, self.receives, *closes):
                    os.close(descriptor)
                _serve(work, limits, items, answers)
            finally:
                os._exit(1)
        os.close(items)
        os.close(answers)

    def end(self) -> int:
        """Kill it if it still runs; returns its wait status."""
        os.close(self.sends)
        os.close(self.receives)
        os.kill(self.process, signal.SIGKILL)  # of a process that is not reaped yet, so the id is its own
        return os.waitpid(self.process, 0)[1]


def _serve(work: Work, limits: Limits, items: int, answers: int) -> NoReturn:
    """Answer lines of items, one line for each item as soon as it is done; never returns."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGPROF, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = _Lines(items)
    while (line := reader.next()) is not None:
        for item in json.loads(line):
            if limits.cpu_seconds is not None:
                signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
            try:
                answer = work(item)
            except MemoryError:
                os._exit(_ENDS_OUT_OF_MEMORY)
            except RecursionError:
                answer = ["failed", "nested too deeply"]
            if limits.cpu_seconds is not None:
                signal.setitimer(signal.ITIMER_PROF, 0)
            _write(answers, json.dumps(answer))
    os._exit(0)


class _Lines:
    """Lines from a descriptor, and whether one can be had."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._rest = b""

    def next(self) -> str | None:
        """The next line, waited for; None at the end."""
        while b"\n" not in self._rest:
            piece = os.read(self.descriptor, 1 << 16)
            if not piece:
                return None
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    @property
    def has_line(self) -> bool:
        return b"\n" in self._rest


def _write(descriptor: int, line: str) -> None:
    data = (line + "\n").encode()
    while data:
        data = data[os.write(descriptor, data) :]


class _Supervisor:
    def __init__(self, work: Work, limits: Limits, *, requests: int, replies: int) -> None:
        self._work, self._limits = work, limits
        self._requests, self._replies = _Lines(requests), replies
        self._parent = os.getppid()
        self._worker: _Worker | None = None

    def run(self) -> None:
        """Answer batches until the run closes its end, or ends."""
        try:
            while (line := self._next_request()) is not None:
                self._answer(json.loads(line))
        finally:
            if self._worker is not None:
                self._worker.end()

    def _next_request(self) -> str | None:
        while not self._requests.has_line and not select.select([self._requests.descriptor], [], [], _POLL_SECONDS)[0]:
            self._check_parent()
        return self._requests.next()

    def _answer(self, items: list[Any]) -> None:
        done: list[list[Any]] = []
        tried_again = -1
        while len(done) < len(items):
            worker = self._ready_worker()
            with suppress(BrokenPipeError):  # its end is seen below
                _write(worker.sends, json.dumps(items[len(done) :]))
            lines, ended = _Lines(worker.receives), ""
            while len(done) < len(items) and not ended:
                ended = self._wait(lines)
                line = None if ended else lines.next()
                if line is not None:
                    done.append(json.loads(line))
                    worker.num_done += 1
                elif not ended:
                    ended = "it"
            if len(done) < len(items):
                self._worker = None
                status = worker.end()
                if ended == "it" and _is_from_outside(status) and tried_again != len(done):
                    tried_again = len(done)  # the item may have no part in it
                    continue
                done.append(["killed", self._why(status, ended)])
        _write(self._replies, json.dumps(done))

    def _ready_worker(self) -> _Worker:
        if self._worker is not None and self._worker.num_done >= _ITEMS_OF_A_WORKER:
            self._worker.end()
            self._worker = None
        if self._worker is None:
            self._worker = _Worker(self._work, self._limits, closes=(self._requests.descriptor, self._replies))
        return self._worker

    def _wait(self, lines: _Lines) -> str:
        """Until a worker says something or ends: nothing; else why it is to be ended."""
        deadline = time.monotonic() + self._limits.wall_seconds
        while not lines.has_line:
            left = deadline - time.monotonic()
            if left <= 0:
                return f"{self._limits.wall_seconds:g} s"
            if select.select([lines.descriptor], [], [], min(left, _POLL_SECONDS))[0]:
                return ""
            self._check_parent()
        return ""

    def _why(self, status: int, ended: str) -> str:
        if ended != "it":
            return ended
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            return f"{self._limits.cpu_seconds:g} s of CPU time"
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _ENDS_OUT_OF_MEMORY:
            return f"{self._limits.memory_bytes / 2**30:g} GiB of memory"
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        return f"its process ended by {how}"

    def _check_parent(self) -> None:
        """A run that was killed may have left its end of the pipe with another process."""
        if os.getppid() != self._parent:
            raise SystemExit(1)


def _is_from_outside(status: int) -> bool:
    """Whether it was SIGKILL, which is no limit of ours: somebody's hand, or a kernel short of memory."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _leave(*_: object) -> NoReturn:
    """Asked to end, with the worker: it is killed and reaped on the way out."""
    raise SystemExit(0)


def _checks() -> Work:
    """The work of a worker that checks answers."""
    from prism_megatron.rewards.check import judge
    from prism_megatron.rewards.kinds.latex import read, same_expression
    from prism_megatron.rewards.verdict import Ask

    for text in _WARM_UP:  # the parser builds its tables as it goes
        read(text)

    def work(item: Any) -> list[Any]:
        verdict = judge(Ask(*item), same_expression)
        return ["done", verdict.right, verdict.kind, verdict.seconds, verdict.reason]

    return work


def _calls(name: str) -> Work:
    """The work of a worker that calls a user's function. Raises RewardError where there is none of that name."""
    from prism_megatron.rewards.user import call, load

    function = load(name)

    def work(item: Any) -> list[Any]:
        began = time.perf_counter()
        value, problem = call(function, item)
        return ["done", value, problem, time.perf_counter() - began]

    return work


def main(settings: dict[str, Any]) -> None:
    """Serve the run that started this process. The first reply says that it is ready, or why it never will be."""
    from prism_megatron.errors import RewardError

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.dup(1)
    os.dup2(2, 1)  # what a user's function prints is no reply
    try:
        work = _calls(settings["function"]) if settings["function"] else _checks()
    except RewardError as error:
        _write(replies, json.dumps(["refused", str(error)]))
        sys.exit(2)
    signal.signal(signal.SIGTERM, _leave)
    limits = Limits(settings["cpu_seconds"], settings["wall_seconds"], settings["memory_bytes"])
    with suppress(BrokenPipeError):  # the run has ended
        _write(replies, json.dumps(["ready"]))
        _Supervisor(work, limits, requests=0, replies=replies).run()
