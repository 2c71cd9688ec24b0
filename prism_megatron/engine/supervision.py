"""Ranks that a command started, until the last has ended: what they say, what is asked of them, and their end.

Imports no torch, as ``launch.py`` does not.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import FrameType

from prism_megatron.terminal import INTERRUPTED_TEXT

FAILURE = 1
_GRACE_SECONDS = 3.0
_ECHO_SECONDS = 1.0
"""A wrapper may send on what its whole process group was sent: two signals within this time are one."""


class Wishes:
    """Signals to this process: the first is passed on to the ranks, which end by themselves; a second ends them all."""

    def __init__(self, ranks: Sequence[ForkServerProcess], world_size: int) -> None:
        self._ranks = ranks
        self._world_size = world_size
        self.heard: signal.Signals | None = None
        self._since = 0.0
        self._ending = False
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._ending:
            return
        first, self.heard = self.heard is None, self.heard or signal.Signals(number)
        if first:
            self._since = time.monotonic()
        elif time.monotonic() - self._since < _ECHO_SECONDS:
            return
        if not first or len(self._ranks) < self._world_size:
            self._ending = True
            raise KeyboardInterrupt
        for process in self._ranks:
            if process.exitcode is None:
                process.terminate()

    def status_of(self, status: int) -> int:
        """The command's own: ranks that knew of no wish were ended by the signal, as the command then was."""
        if self.heard is None or status != FAILURE:
            return status
        if self.heard is signal.SIGINT:
            print(INTERRUPTED_TEXT, file=sys.stderr, flush=True)
        return 128 + self.heard

    def end(self) -> None:
        """End every rank that still runs: SIGTERM, and SIGKILL for those that have not gone in time.

        No signal is heard any more: one that broke this off would leave ranks that the command then waits for.
        """
        self._ending = True
        for process in self._ranks:
            if process.exitcode is None:
                process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()

    def forget(self) -> None:
        """Leave signals to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def supervise(ranks: Sequence[ForkServerProcess], reports: Sequence[Connection], wishes: Wishes) -> int:
    """Wait for all ranks, or for the first that fails; what that one reports is all that is printed.

    A rank that was ended from outside comes before the others' complaints about it.
    """
    running = dict(enumerate(ranks))
    advice = ""
    while running:
        wait(
            [
                *(process.sentinel for process in running.values()),
                *(reports[rank] for rank in running if not reports[rank].closed),
            ]
        )
        for rank, process in sorted(running.items(), key=lambda item: not _was_ended(item[1])):
            while (report := _report(reports[rank])) is not None:
                status, text = report
                if status is not None:
                    print(text, file=sys.stderr, flush=True)
                    return status
                advice = f"; {text}"
            if process.exitcode is not None:
                del running[rank]
                if process.exitcode:
                    how = (
                        f"was ended by {signal.Signals(-process.exitcode).name}"
                        if process.exitcode < 0
                        else f"ended with status {process.exitcode}"
                    )
                    if wishes.heard is None:
                        print(f"rank {rank} {how}{advice}", file=sys.stderr, flush=True)
                    return FAILURE
    return 0


def _was_ended(process: ForkServerProcess) -> bool:
    return process.exitcode is not None and process.exitcode < 0


def _report(connection: Connection) -> tuple[int | None, str] | None:
    """What a rank says, with the status it fails with or None for advice; None where it says nothing (more)."""
    if connection.closed or not connection.poll():
        return None
    try:
        status, text = connection.recv()
    except EOFError:
        connection.close()
        return None
    return None if status is None else int(status), str(text)
