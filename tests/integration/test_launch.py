"""A command's world of processes: how it starts, how it fails, and that it leaves nothing behind.

Everything runs ``launch_script.py`` under plain python and under torchrun, as a user would. Where the claim is not
about starting, the ranks inherit torch alone, which saves time. Blind spot: one host, no GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "tests" / "integration" / "launch_script.py"
OUTER = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
}
START_SECONDS = 120.0
"""Generous: the machine may be busy, and only hanging is a failure here."""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the script; whatever of it still runs at the end of the test is ended."""
    running: list[subprocess.Popen[str]] = []

    def start(
        outer: Sequence[str], action: str, folder: Path, size: int, *, preload: str = "torch", **variables: str
    ) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PRISM_")}
        process = subprocess.Popen(
            [*outer, str(SCRIPT), action, str(folder), str(size), preload],
            cwd=REPOSITORY,
            env={**environment, "PYTHONPATH": str(REPOSITORY), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ranks(folder: Path, size: int) -> list[dict[str, float]]:
    """What the ranks wrote once all had met, waiting until they have."""
    wait_for(lambda: len(list(folder.glob("rank*.json"))) >= size, seconds=START_SECONDS)
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("rank*.json"))]


def assert_gone(pids: Sequence[int], seconds: float) -> None:
    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:  # it may go between two looks
            return False

    wait_for(lambda: not any(map(alive, pids)), seconds=seconds)


@pytest.mark.parametrize("outer", OUTER)
def test_one_process_starts_the_ranks_it_needs(outer: str, start: Start, tmp_path: Path) -> None:
    """Claim: eight ranks meet and add up 0…7, after one line that says what is being done."""
    process = start(OUTER[outer], "add", tmp_path, 8, preload="all")
    output, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, errors
    assert output.splitlines() == ["8 processes are needed and this is one: starting 8 on this host"]
    lines = ranks(tmp_path, 8)
    assert [line["sum"] for line in lines] == [28.0] * 8
    assert_gone([int(line["pid"]) for line in lines], 5.0)
    print(f"{outer}: 8 ranks met after {max(line['seconds'] for line in lines):.1f} s")


def test_torchrun_with_its_own_ranks_is_left_alone(start: Start, tmp_path: Path) -> None:
    process = start([*OUTER["torchrun"], "--nproc-per-node=2"], "add", tmp_path, 1)
    output, errors = process.communicate(timeout=START_SECONDS)
    assert (process.returncode, output) == (0, ""), errors
    assert [line["sum"] for line in ranks(tmp_path, 2)] == [1.0] * 2


def test_world_that_the_layout_does_not_divide_is_refused(start: Start, tmp_path: Path) -> None:
    """Claim: torchrun's ranks say once what is wrong, before they meet. torchrun adds a report of its own."""
    process = start([*OUTER["torchrun"], "--nproc-per-node=3"], "add", tmp_path, 2)
    _, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode != 0
    assert errors.count("the layout takes a multiple of 2 processes, not 3; use --nproc-per-node 2") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("outer", OUTER)
def test_two_commands_at_once_do_not_meet_each_other(outer: str, start: Start, tmp_path: Path) -> None:
    first = start(OUTER[outer], "add", tmp_path / "a", 2)
    second = start(OUTER[outer], "add", tmp_path / "b", 3)
    for process, folder, size in ((first, tmp_path / "a", 2), (second, tmp_path / "b", 3)):
        _, errors = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 0, errors
        assert [line["sum"] for line in ranks(folder, size)] == [sum(range(size))] * size


def test_ranks_meet_though_tmpdir_is_too_long_for_sockets(start: Start, tmp_path: Path) -> None:
    """Claim: the fork server's socket goes to a short folder, from which it is gone in the end."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    before = set(Path("/tmp").glob("pymp-*"))
    process = start(OUTER["python"], "add", tmp_path / "ranks", 2, TMPDIR=str(long))
    _, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, errors
    assert [line["sum"] for line in ranks(tmp_path / "ranks", 2)] == [1.0, 1.0]
    assert not set(Path("/tmp").glob("pymp-*")) - before


def test_ranks_meet_where_the_host_has_ipv6_alone(start: Start, tmp_path: Path) -> None:
    """Claim: without 127.0.0.1 the ranks of one host take ::1. Blind spot: NCCL."""
    alone = "ip link set lo up && ip addr del 127.0.0.1/8 dev lo"
    if subprocess.run(["unshare", "-n", "sh", "-c", alone], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own can be made here")
    command = ["unshare", "-n", "sh", "-c", f'{alone} && exec "$@"', "sh", sys.executable]
    process = start(command, "add", tmp_path, 2)
    _, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, errors
    assert [line["sum"] for line in ranks(tmp_path, 2)] == [1.0, 1.0]


FAILURES = {
    "config-error": (2, "error: --tp 3 must divide the model's 4 KV heads", 0),
    "crash": (1, "rank 1 failed", 1),
    "die": (1, "rank 1 ended with status 7", 0),
}
"""Action: exit status, first line, number of tracebacks."""


@pytest.mark.parametrize("action", FAILURES)
def test_failure_is_told_once_and_ends_the_world(action: str, start: Start, tmp_path: Path) -> None:
    """Claim: the cause alone is printed, and the rank that waits for the failed one is ended."""
    status, first, tracebacks = FAILURES[action]
    process = start(OUTER["python"], action, tmp_path, 2)
    lines = ranks(tmp_path, 2)
    _, errors = process.communicate(timeout=30.0)
    assert process.returncode == status
    assert errors.splitlines()[0] == first
    assert errors.count("Traceback") == tracebacks
    assert tracebacks or len(errors.splitlines()) == 1
    assert_gone([int(line["pid"]) for line in lines], 5.0)


def test_signals_while_ranks_are_ended_leave_none(start: Start, tmp_path: Path) -> None:
    """Claim: whoever is impatient while a failed world ends waits for its ranks' grace, not for ranks that sleep."""
    process = start(OUTER["python"], "linger", tmp_path, 2)
    lines = ranks(tmp_path, 2)
    assert process.stderr is not None
    assert process.stderr.readline() == "error: all is over\n"
    process.send_signal(signal.SIGTERM)
    later = time.monotonic() + 1.1  # than what would be an echo
    wait_for(lambda: time.monotonic() >= later)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30.0)
    assert (process.returncode, errors) == (2, "")
    assert_gone([int(line["pid"]) for line in lines], 5.0)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_process_outlives_the_outer_one(outer: str, number: signal.Signals, start: Start, tmp_path: Path) -> None:
    """Claim: 10 s after the outer process got the signal, none it brought about is left: ranks, fork server, tool.

    The signal goes to the outer process alone; Ctrl-C, which the terminal sends to its whole group, is the easier case.
    """
    process = start(OUTER[outer], "hang", tmp_path, 2)
    lines = ranks(tmp_path, 2)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    assert {int(line["pid"]) for line in lines} < set(family)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30.0)
    assert process.returncode != 0
    if outer == "python" and number is signal.SIGINT:
        assert (process.returncode, errors) == (130, "interrupted\n")
    assert_gone(family, 10.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_ranks_of_torchrun_do_not_outlive_it(number: signal.Signals, start: Start, tmp_path: Path) -> None:
    """Claim: the same where torchrun started the ranks itself."""
    process = start([*OUTER["torchrun"], "--nproc-per-node=2"], "hang", tmp_path, 1)
    pids = [int(line["pid"]) for line in ranks(tmp_path, 2)]
    process.send_signal(number)
    assert_gone(pids, 10.0)
