"""Runs tests on copies of the tree, each with one defect in it.

pytest and the libraries below are imported once, here; every run is a fork, which starts in milliseconds and imports
this project anew from its copy. Nothing of the project may be imported before a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

LIBRARIES = ("torch._dynamo", "torch.distributed.checkpoint", "transformers", "megatron.core", "hypothesis", "tyro")
PROJECT = ("prism_megatron", "model_providers")


@dataclass(frozen=True)
class Run:
    """How one run of pytest ended. ``failed`` has node ids; ``hung`` says that it was ended by the time limit."""

    status: int
    failed: tuple[str, ...]
    hung: bool
    seconds: float
    log: Path

    def noticed_by(self, test: str) -> bool:
        """Whether a test of this node id, or one below it, failed."""
        return any(node == test or node.startswith((f"{test}[", f"{test}::")) for node in self.failed)


@dataclass(frozen=True)
class Job:
    """Tests to run in a copy; ``prepare`` edits the copy and returns what undoes that."""

    name: str
    tests: tuple[str, ...]
    prepare: Callable[[Path], Callable[[], None]]
    first_failure_is_enough: bool = False


def preload() -> None:
    """Import what every run needs, before the first fork."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # megatron-core says that Transformer Engine is not installed
        for library in LIBRARIES:
            importlib.import_module(library)
    loaded = [name for name in sys.modules if name.partition(".")[0] in PROJECT]
    assert not loaded, f"imported before the fork, and so not from the copy: {loaded}"


def copy_tree(root: Path, target: Path) -> None:
    """Everything that git tracks or would track, as it is on disk."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = root / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def write_edit(path: Path, text: str) -> Callable[[], None]:
    """Put ``text`` in ``path`` and return what puts the old text back. Compiled files are told apart by time and size,
    which an edit may leave as they were, so they are removed."""
    before = path.read_text(encoding="utf-8")

    def put(content: str) -> None:
        path.write_text(content, encoding="utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()

    put(text)
    return lambda: put(before)


def run_all(jobs: Sequence[Job], copies: Sequence[Path], logs: Path, *, timeout_s: float) -> Iterator[tuple[Job, Run]]:
    """Run the jobs, as many at a time as there are copies; yields each as it ends."""
    waiting = list(reversed(jobs))
    free = list(copies)
    running: dict[int, tuple[Job, Path, float, Path, Callable[[], None]]] = {}
    number = 0
    try:
        while waiting or running:
            while waiting and free:
                job, copy = waiting.pop(), free.pop()
                log = logs / f"{number:04d}.log"
                number += 1
                undo = job.prepare(copy)
                running[_fork(job, copy, log)] = (job, copy, time.monotonic(), log, undo)
            for pid, (job, copy, started, log, undo) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                hung = not ended and time.monotonic() - started > timeout_s
                if not ended and not hung:
                    continue
                _end_group(pid)
                if hung:
                    os.waitpid(pid, 0)
                del running[pid]
                undo()
                free.append(copy)
                report = log.with_suffix(".json")
                failed = tuple(json.loads(report.read_text())) if report.is_file() else ()
                code = -1 if hung else os.waitstatus_to_exitcode(status)
                yield job, Run(code, failed, hung, time.monotonic() - started, log)
            time.sleep(0.05)
    finally:
        for pid in running:
            _end_group(pid)


def _end_group(pid: int) -> None:
    """End what a run may have left behind: ranks, fork servers, fake servers."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _fork(job: Job, copy: Path, log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        status = _run_pytest(job, copy, log)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run_pytest(job: Job, copy: Path, log: Path) -> int:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry and Path(entry).resolve() != _repository())]
    os.environ["PYTHONPATH"] = str(copy)
    recorder = _Recorder(log.with_suffix(".json"))
    options = ["-x"] if job.first_failure_is_enough else []
    return int(pytest.main([*options, "--slow", "-q", "-p", "no:cacheprovider", *job.tests], plugins=[recorder]))


def _repository() -> Path:
    return Path(__file__).resolve().parents[2]


class _Recorder:
    """Writes the node ids that failed, in any phase."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)
            self.path.write_text(json.dumps(self.failed))
