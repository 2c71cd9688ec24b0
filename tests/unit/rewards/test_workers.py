"""Processes that check: ended by their own clock and replaced, of one mind whatever their number, gone at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from prism_megatron.errors import RewardError
from prism_megatron.rewards.checker import Checker
from prism_megatron.rewards.verdict import Ask, Verdict
from prism_megatron.rewards.workers import Workers, WorkSettings
from tests.conftest import REPOSITORY
from tests.unit.rewards.hostile import hostile_asks
from tests.waiting import wait_for

EQUAL = Ask(r"\sqrt{8}", r"2\sqrt{2}")
OTHER = Ask(r"\sqrt{9}", r"2\sqrt{2}")
BURNS = Ask(r"\ln(\ln(\ln(\ln(\ln(\ln(\ln(9)))))))", r"\sqrt{2}")
CASES = [json.loads(line) for line in Path(__file__).with_name("cases.jsonl").read_text(encoding="utf-8").splitlines()]
BURNER = f"{__package__ or 'tests.unit.rewards'}.burners"


def checking(of: psutil.Process | None = None) -> list[psutil.Process]:
    """Supervisors and workers below a process, or this one, which may have other children too."""
    found = (of or psutil.Process()).children(recursive=True)
    return [child for child in found if "rewards.supervisor" in " ".join(child.cmdline())]


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that a moment does not end: the kernel takes a killed process's files before its name."""
    return psutil.wait_procs(processes, timeout=1)[1]


def _facts(verdict: Verdict) -> tuple[bool, str, bool, bool]:
    return verdict.right, verdict.kind, verdict.guarded, verdict.killed


def test_verdicts_do_not_depend_on_the_number_of_workers() -> None:
    """Claim: all cases and some hostile answers, forwards and backwards, with 1, 2 and 4 processes.

    Blind spot: a check whose time is within the noise of its limit.
    """
    asks = [Ask(case["answer"], case["gold"], case.get("answer_type")) for case in CASES] + hostile_asks(48, seed=6)
    found = []
    for workers in (1, 2, 4):
        with Checker(workers=workers) as checker:
            order = asks if workers != 2 else asks[::-1]
            verdicts = [_facts(future.result(timeout=120)) for future in checker.submit(order)]
            found.append(verdicts if workers != 2 else verdicts[::-1])
    assert found[0] == found[1] == found[2]


def test_a_check_that_burns_is_killed_counted_and_told_once() -> None:
    said: list[str] = []
    with Checker(workers=1, seconds=0.2, say=said.append) as checker:
        before, killed, after = (future.result(timeout=60) for future in checker.submit([EQUAL, BURNS, OTHER]))
        again = checker.check(BURNS)
        counts = dict(checker.counts)
    assert (before.right, killed.right, after.right) == (True, False, False)
    assert killed.reason == "killed: 0.2 s of CPU time"
    assert killed.kind == "latex"
    assert again == killed, "a pair that burned once is not tried again"
    assert (counts["killed"], counts["workers killed"], counts["checks"]) == (2, 1, 4)
    (line,) = said
    assert line == f"the check of an answer ({repr(BURNS.answer)[1:-1]}) was {killed.reason}; it counts as wrong"


def test_the_clock_is_the_workers_own() -> None:
    """Claim: items that wait behind others, for longer than the limit in all, are not ended."""
    with Workers(WorkSettings(function=f"{BURNER}:burn", cpu_seconds=1.0), workers=1) as workers:
        began = time.monotonic()
        answers = [future.result(timeout=120) for future in workers.submit([_call(f"{0.3}")] * 6)]
        assert time.monotonic() - began > 1.0
    assert [answer[:2] for answer in answers] == [["done", 1.0]] * 6


def test_a_stopped_worker_is_not_blamed() -> None:
    """Claim: time in which a worker does not get the CPU does not count: here it is stopped for twice its limit."""
    with Workers(WorkSettings(function=f"{BURNER}:burn", cpu_seconds=0.6), workers=1) as workers:
        workers.submit([_call("0")])[0].result(timeout=60)
        (worker,) = checking()[-1:]
        before = worker.cpu_times().user
        future = workers.submit([_call("0.3")])[0]
        wait_for(lambda: worker.cpu_times().user > before)
        worker.suspend()
        time.sleep(1.2)  # a span and no state: twice the limit goes by, however fast the machine is
        worker.resume()
        assert future.result(timeout=60)[0] == "done"


def test_memory_is_limited() -> None:
    with Workers(WorkSettings(function=f"{BURNER}:grow", cpu_seconds=None, memory_bytes=2**29), workers=1) as workers:
        killed, after = (future.result(timeout=60) for future in workers.submit([_call("4"), _call("0")]))
    assert killed == ["killed", "0.5 GiB of memory"]
    assert after[:2] == ["done", 1.0]


def test_a_worker_that_crashes_is_replaced() -> None:
    with Workers(WorkSettings(function=f"{BURNER}:crash"), workers=1) as workers:
        killed, after = (future.result(timeout=60) for future in workers.submit([_call("11"), _call("0")]))
    assert killed == ["killed", "its process ended by signal 11"]
    assert after[:2] == ["done", 1.0]


def test_a_worker_that_is_ended_from_outside_is_no_verdict() -> None:
    """Claim: SIGKILL to an idle worker, as one that frees memory sends it, changes no outcome; an item that brings it
    about by itself is tried twice, and then counts as killed."""
    with Workers(WorkSettings(function=f"{BURNER}:crash"), workers=1) as workers:
        workers.submit([_call("0")])[0].result(timeout=60)
        worker = max(checking(), key=lambda one: one.create_time())
        worker.kill()
        assert workers.submit([_call("0")])[0].result(timeout=60)[:2] == ["done", 1.0]
        itself, after = (future.result(timeout=60) for future in workers.submit([_call("9"), _call("0")]))
    assert itself == ["killed", "its process ended by signal 9"]
    assert after[:2] == ["done", 1.0]


def test_no_worker_has_torch() -> None:
    with Workers(WorkSettings(function=f"{BURNER}:holds_torch"), workers=1) as workers:
        assert workers.submit([_call("")])[0].result(timeout=60)[1] == 0.0


def test_a_lost_supervisor_is_replaced_and_its_items_are_done() -> None:
    with Checker(workers=1) as checker:
        assert checker.check(EQUAL).right
        (supervisor,) = (child for child in checking() if child.ppid() == psutil.Process().pid)
        supervisor.kill()
        assert not checker.check(OTHER).right
        assert supervisor not in checking()


def test_closing_leaves_nobody_and_tells_those_who_wait() -> None:
    workers = Workers(WorkSettings(function=f"{BURNER}:burn", cpu_seconds=30.0), workers=2)
    futures: list[Future[list[object]]] = workers.submit([_call("20")] * 4)
    wait_for(lambda: len(checking()) == 4)
    children = checking()
    workers.close()
    assert not _alive(children)
    for future in futures:
        with pytest.raises(RewardError, match="closed"):
            future.result(timeout=5)
    with pytest.raises(RewardError, match="closed"):
        workers.submit([_call("0")])
    workers.close()


def test_an_error_in_the_run_leaves_nobody() -> None:
    children: list[psutil.Process] = []

    def play() -> None:
        with Checker() as checker:
            checker.check(EQUAL)
            children.extend(checking())
            raise KeyError("of the run")

    with pytest.raises(KeyError):
        play()
    assert children
    assert not _alive(children)


@pytest.mark.parametrize("how", ["killed", "forgot", "killed beside a fork"])
def test_a_run_that_ends_in_any_way_leaves_nobody(how: str) -> None:
    """Claim: killed from outside, ended without close, and killed while a fork of it holds its end of the pipes."""
    code = (
        "import os, signal\n"
        "from prism_megatron.rewards.workers import Workers, WorkSettings\n"
        f"workers = Workers(WorkSettings(function='{BURNER}:burn', cpu_seconds=60.0), workers=1)\n"
        "item = dict(id='', question='', response='', valid=True, gold='', answer_type=None)\n"
        "workers.submit([item | dict(answer='0')])[0].result()\n"
        "workers.submit([item | dict(answer='50')])\n"
        f"if {'fork' in how} and os.fork() == 0:\n    signal.pause()\n"
        "print('ready', flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        children = psutil.Process(run.pid).children(recursive=True)
        workers = checking(psutil.Process(run.pid))
        assert len(workers) == 2, "a supervisor and its worker"
        burning = max(workers, key=lambda one: one.pid)
        spent = burning.cpu_times().user
        wait_for(lambda: burning.cpu_times().user > spent)
        if how == "forgot":
            assert run.stdin is not None
            run.stdin.write("\n")
            run.stdin.flush()
        else:
            os.kill(run.pid, signal.SIGKILL)
        run.wait(timeout=30)
        gone, alive = psutil.wait_procs(workers, timeout=10)
        for child in children:
            if child not in workers and child.is_running():
                child.kill()
    assert len(gone) == 2
    assert not alive


def _call(answer: str) -> dict[str, object]:
    return {"id": "", "question": "", "response": "", "valid": True, "answer": answer, "gold": "", "answer_type": None}
