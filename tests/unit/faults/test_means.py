"""By what a trial acts and sees: processes and their roles, landmarks, a clock, a disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prism_megatron.rollout.sglang.arguments import server_environment
from tests.faults import clock, faults, processes
from tests.faults.processes import Seen, roles_of
from tests.faults.watch import Watch
from tests.waiting import wait_for

FORKED = "python -c from multiprocessing.forkserver import main; main(...)"


def seen(*rows: tuple[int, int, str]) -> list[Seen]:
    return [Seen(pid, parent, float(pid), words) for pid, parent, words in rows]


def test_roles_of_a_run_with_ranks_of_its_own() -> None:
    """Claim: the launcher's fork server forks the ranks first, and what it forks for them are their readers."""
    found = seen(
        (1, 0, "python tools/run_sft.py --tp 2"),
        (2, 1, "python -c from multiprocessing.resource_tracker import main"),
        (3, 1, FORKED), (4, 3, FORKED), (5, 3, FORKED), (6, 3, FORKED),
        (7, 4, "python -c ... rewards.supervisor import"), (8, 7, "python -c ... rewards.supervisor import"),
        (9, 4, "python -P guard.py 3 --config x"), (10, 9, "sh"),
    )  # fmt: skip
    assert list(roles_of(found, root=1, ranks=2).values()) == [
        "launcher", "resource tracker", "fork server", "rank", "rank", "loader worker", "reward supervisor",
        "reward worker", "server", "other",
    ]  # fmt: skip


def test_roles_under_torchrun_and_of_one_rank() -> None:
    found = [Seen(1, 0, 1.0, "python -m torch.distributed.run"), Seen(2, 1, 2.0, "python tools/run_sft.py", "0"),
             Seen(3, 1, 3.0, "python tools/run_sft.py", "1"), Seen(4, 2, 4.0, FORKED, "0"),
             Seen(5, 4, 5.0, FORKED, "0")]  # fmt: skip
    assert list(roles_of(found, root=1, ranks=2).values()) == [
        "launcher", "rank", "rank", "fork server", "loader worker",
    ]  # fmt: skip
    alone = seen((1, 0, "python tools/run_sft.py"), (2, 1, FORKED), (3, 2, FORKED))
    assert list(roles_of(alone, root=1, ranks=1).values()) == ["rank", "fork server", "loader worker"]
    stages = seen((1, 0, "python tools/run_pipeline.py"), (2, 1, "python -m prism_megatron sft"))
    assert list(roles_of(stages, root=1, ranks=1, pipeline=True).values()) == ["pipeline", "rank"]


def test_processes_are_found_by_their_word_and_ended() -> None:
    """Claim: a child of a child in a session of its own is found too; one of another word is left alone."""
    word = f"test-{os.getpid()}"
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], start_new_session=True)"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env={**os.environ, processes.TAG: tag})
        for tag in (word, f"{word}-other")
    ]
    try:
        wait_for(lambda: len(processes.of_trial(word)) == 2)
        assert len(processes.left(word, seconds=0.0)) == 2
        processes.kill([one.pid for one in processes.of_trial(word)])
        assert processes.left(word, seconds=5.0) == []
        assert started[1].poll() is None
    finally:
        processes.kill([one.pid for tag in (word, f"{word}-other") for one in processes.of_trial(tag)])
        for process in started:
            process.communicate()


def test_a_server_has_the_word_too() -> None:
    """Claim: the environment that a run starts servers with keeps it."""
    assert server_environment({processes.TAG: "x"}, tp=1, cuda=False)[processes.TAG] == "x"


def test_landmarks_are_names_and_lines(tmp_path: Path) -> None:
    """Claim: in the order in which they come; half a line is none, and a committed checkpoint is one name."""
    watch = Watch(tmp_path / "run")
    watch.look()
    (tmp_path / "run" / "checkpoints" / ".step_000001.saving").mkdir(parents=True)
    watch.look()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    (tmp_path / "run" / "checkpoints" / "step_000001").mkdir()
    (tmp_path / "run" / "checkpoints" / "step_000001" / "state.json").touch()
    watch.look()
    assert list(watch.seen)[:3] == ["start", "checkpoints", "checkpoints/.step_000001.saving"]
    assert set(list(watch.seen)[3:]) == {"checkpoints/step_000001", "metrics.jsonl", "metrics.jsonl#1"}
    assert watch.until(lambda: True, seconds=0.0) and not watch.until(lambda: False, seconds=0.0)


@pytest.mark.parametrize("forward", [True, False])
def test_a_clock_jumps_for_those_who_read_it(tmp_path: Path, forward: bool) -> None:
    """Claim: in the middle of a process, by an hour; what measures spans is left, and so is this process."""
    code = "import time\nfor _ in range(2): print(time.time(), time.time_ns(), time.monotonic(), flush=True); input()"
    environment = {**os.environ, clock.FILE: str(tmp_path / "clock"), "PYTHONPATH": str(clock.shim(tmp_path / "shim"))}
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=environment) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        before = [float(word) for word in process.stdout.readline().split()]
        clock.jump(tmp_path / "clock", forward=forward)
        here = time.time()
        process.stdin.write("\n")
        process.stdin.flush()
        after = [float(word) for word in process.stdout.readline().split()]
        process.communicate("\n")
    hour = 3600.0 if forward else -3600.0
    assert abs(after[0] - before[0] - hour) < 60 and abs(after[1] / 1e9 - after[0]) < 1  # seconds; a busy machine
    assert 0 <= after[2] - before[2] < 60
    assert abs(here - before[0]) < 60


def test_a_disk_is_filled_and_freed(tmp_path: Path) -> None:
    """Claim: not a byte is left, and all of them are afterwards."""
    if not faults.may_mount(tmp_path):
        pytest.skip("this user may not mount a tmpfs")
    with faults.small_disk(tmp_path / "disk"):
        faults.fill(tmp_path / "disk")
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "disk" / "more").write_bytes(b"x" * 4096)
        faults.make_room(tmp_path / "disk")
        (tmp_path / "disk" / "more").write_bytes(b"x" * 4096)
