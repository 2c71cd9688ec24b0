"""The processes of a trial: found by a word in their environment, which all that a run starts inherit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

TAG = "FAULTS_TRIAL"
"""Servers are started without variables of Python's and of torchrun's; this is neither."""
_GONE_SECONDS = 20.0
"""What a run leaves to the kernel, or to a loop that looks for its parent every second, is gone by then."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Seen:
    """A process at one moment."""

    pid: int
    parent: int
    created: float
    words: str
    """its command line"""
    rank: str | None = None
    """RANK, where whoever started it set that"""


def of_trial(word: str) -> list[Seen]:
    """All processes with the word, oldest first; those that have ended and wait to be reaped are not among them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError), process.oneshot():
            environment = process.environ()
            if environment.get(TAG) == word and process.status() != psutil.STATUS_ZOMBIE:
                found.append(
                    Seen(process.pid, process.ppid(), process.create_time(), " ".join(process.cmdline()),
                         environment.get("RANK"))
                )  # fmt: skip
    return sorted(found, key=lambda seen: (seen.created, seen.pid))


def roles_of(seen: Sequence[Seen], *, root: int, ranks: int, pipeline: bool = False) -> dict[int, str]:
    """What each process is, by its id. ``root`` is the one that was started, of a run on ``ranks`` ranks."""
    by_id = {one.pid: one for one in seen}
    roles: dict[int, str] = {}
    for one in seen:
        parent = by_id.get(one.parent)
        if one.pid == root:
            roles[one.pid] = "pipeline" if pipeline else "rank" if ranks == 1 else "launcher"
        elif "multiprocessing.forkserver" in one.words:
            roles[one.pid] = _of_fork_server(one, parent, roles, ranks)
        elif "multiprocessing.resource_tracker" in one.words:
            roles[one.pid] = "resource tracker"
        elif "rewards.supervisor" in one.words:
            is_forked = parent is not None and parent.words == one.words
            roles[one.pid] = "reward worker" if is_forked else "reward supervisor"
        elif "launch_server" in one.words or "guard.py" in one.words:
            roles[one.pid] = "server"
        elif one.rank is not None or (pipeline and one.parent == root):
            roles[one.pid] = "rank"
        else:
            roles[one.pid] = "other"
    return roles


def _of_fork_server(one: Seen, parent: Seen | None, roles: dict[int, str], ranks: int) -> str:
    """A fork server, or what one has forked: the launcher's forks the ranks first, then what these want to have."""
    if parent is None or parent.words != one.words:
        return "fork server"
    grandparent = roles.get(parent.parent)
    started = sum(role == "rank" for role in roles.values())
    return "rank" if grandparent == "launcher" and started < ranks else "loader worker"


def kill(pids: Sequence[int]) -> None:
    """SIGKILL to all of them, none of which runs on while another is ended."""
    for word in ("suspend", "kill"):
        for pid in pids:
            with suppress(psutil.Error, OSError):
                getattr(psutil.Process(pid), word)()


def left(word: str, *, seconds: float | None = None) -> list[Seen]:
    """What is still there of a trial that has ended, after it was given time to go."""
    deadline = time.monotonic() + (_GONE_SECONDS if seconds is None else seconds)
    while (found := of_trial(word)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return found
