"""A run goes on as itself through its command line: what it says, what it refuses, and that a refusal changes no file.

Blind spot: what a field means; which class each has is in ``tests/unit/config/test_resume.py``.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.observability.metrics import read_metrics
from tests.integration.test_align_records import write_records
from tests.waiting import wait_for

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZES = ("--prompts-per-step", "2", "--rollouts-per-prompt", "2", "--tokens-per-microbatch", "512", "--dtype", "fp32",
         "--format-sft", "0", "--save-every", "1")  # fmt: skip
STEPS = 3
CLOCKS = ("seconds/", "memory/", "time", "reward/slowest_seconds")


@dataclass(frozen=True)
class Kind:
    """A stage's tool, and how a run of it is told from another."""

    tool: str
    flags: tuple[str, ...]
    role: str
    schedule: str

    def command(self, *flags: str) -> list[str]:
        return [sys.executable, str(TOOLS / self.tool), *flags]

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*flags), capture_output=True, text=True, timeout=300, check=False)


KINDS = {
    "align": Kind("run_align.py", (), "policy", "cosine"),
    "warm-start": Kind(
        "run_warm_start.py",
        ("--min-auc", "0", "--gate-prompts", "2", "--gate-rollouts", "2"),
        "discriminator",
        "constant",
    ),
}


@dataclass(frozen=True)
class Finished:
    """A run of three steps that saved each, and what it trained on."""

    kind: Kind
    folder: Path
    data: Path
    rows: list[dict[str, Any]]

    def copied(self, to: Path, *, steps: int = STEPS) -> Path:
        """The run as if it had been killed after ``steps``; with its data, so that nothing of it is shared."""
        shutil.copytree(self.folder, to)
        for step in range(steps + 1, STEPS + 1):
            shutil.rmtree(to / "checkpoints" / f"step_{step:06d}")
        return to


@pytest.fixture(scope="module", params=KINDS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    kind, root = KINDS[request.param], tmp_path_factory.mktemp("resume")
    write_records(root / "set", 24)
    flags = ("--data", str(root / "set"), "--steps", str(STEPS), "--output", str(root / "run"), *SIZES, *kind.flags)
    result = kind.run(*flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return Finished(kind, root / "run", root / "set", read_metrics(root / "run" / "metrics.jsonl"))


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Rows of one run, but for what a clock says. 1e-6: sums over ranks, and over restarts, round alike."""
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        for name, value in wanted.items():
            if not name.startswith(CLOCKS):
                close = value if isinstance(value, str | None) else pytest.approx(value, rel=1e-6, abs=1e-6)
                assert row[name] == close, name


def test_a_bare_load_goes_on_as_the_run_was_begun(finished: Finished, tmp_path: Path) -> None:
    """Claim: ``--load RUN`` alone ends in the rows of the run that was never interrupted."""
    run = finished.copied(tmp_path / "run", steps=1)
    config = (run / "config.yaml").read_bytes()
    result = finished.kind.run("--load", str(run))
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(read_metrics(run / "metrics.jsonl"), finished.rows)
    assert (run / "config.yaml").read_bytes() == config
    assert [path.name for path in run.glob("config*")] == ["config.yaml"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (
            ("--prompts-per-step", "4"),
            "--prompts-per-step was 2 and is 4. Leave --prompts-per-step out, or ask",
        ),
        (("--rollouts-per-prompt", "4"), "--rollouts-per-prompt was 2 and is 4"),
        (("--ROLE.schedule", "SCHEDULE"), "--ROLE.schedule was"),
        (("--seed", "7"), "--seed was 42 and is 7"),
        (("--model", str(MINI_FOLDER / "policy")), "--model was None and is"),
        (("--routing", "dense"), "--routing was segment and is dense"),
        (("--steps", "1"), "is past --steps 1; ask for at least 3"),
        (("--change", "tp"), "--change tp is not needed"),
    ],
)
def test_another_run_is_refused_in_one_line(finished: Finished, flags: tuple[str, ...], complaint: str) -> None:
    kind, before = finished.kind, hashes(finished.folder)
    named = [flag.replace("ROLE", kind.role).replace("SCHEDULE", kind.schedule) for flag in flags]
    result = kind.run("--load", str(finished.folder), *named)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert complaint.replace("ROLE", kind.role) in result.stderr
    assert hashes(finished.folder) == before


@pytest.mark.long
def test_data_that_changed_by_one_record_are_refused_unless_asked_for(finished: Finished, tmp_path: Path) -> None:
    run = finished.copied(tmp_path / "run", steps=2)
    lines = (finished.data / "data.jsonl").read_text().splitlines()
    changed = json.loads(lines[5])
    changed["question"] += " Look twice."
    try:
        (finished.data / "data.jsonl").write_text("\n".join([*lines[:5], json.dumps(changed), *lines[6:]]) + "\n")
        before = hashes(run)
        result = finished.kind.run("--load", str(run))
        assert result.returncode == 2
        assert "--data is not what" in result.stderr and "not the same ones in the same order" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert hashes(run) == before
        (finished.data / "data.jsonl").write_text("\n".join(lines[:5]) + "\n")
        assert "there were" in finished.kind.run("--load", str(run)).stderr
        assert hashes(run) == before
        asked = finished.kind.run("--load", str(run), "--change", "data")
        assert asked.returncode == 0, asked.stdout + asked.stderr
    finally:
        (finished.data / "data.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.long
def test_another_layout_goes_on_and_says_so(finished: Finished, tmp_path: Path) -> None:
    run = finished.copied(tmp_path / "run", steps=2)
    result = finished.kind.run("--load", str(run), "--tp", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "--tp was 1 and is 2" in result.stdout
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["discriminator_loss"] == pytest.approx(finished.rows[-1]["discriminator_loss"], rel=1e-4)
    assert sorted(path.name for path in run.glob("config*")) == ["config-step_000002.yaml", "config.yaml"]


def test_another_runs_folder_is_refused(finished: Finished, tmp_path: Path) -> None:
    other = finished.copied(tmp_path / "other")
    state = other / "checkpoints" / "step_000003" / "state.json"
    document = json.loads(state.read_text())
    document["state"]["run"] = "0" * 32
    state.write_text(json.dumps(document))
    before = hashes(other)
    result = finished.kind.run("--load", str(finished.folder), "--output", str(other))
    assert result.returncode == 2
    assert "were saved by two runs, which must not be mixed" in result.stderr
    assert hashes(other) == before


@pytest.mark.long
def test_a_finished_run_says_so_and_more_steps_go_on(finished: Finished, tmp_path: Path) -> None:
    run = finished.copied(tmp_path / "run")
    result = finished.kind.run("--load", str(run))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"all {STEPS} steps are played: nothing is left to train, and --steps asks for more" in result.stdout
    assert_same(read_metrics(run / "metrics.jsonl"), finished.rows)
    more = finished.kind.run("--load", str(run), "--steps", str(STEPS + 1))
    assert more.returncode == 0, more.stdout + more.stderr
    assert f"--steps was {STEPS} and is {STEPS + 1}" in more.stdout
    stretched = "schedule of discriminator now spans" in more.stdout
    assert stretched is (finished.kind.tool == "run_warm_start.py"), "the mini's warm-start decays its rate"
    rows = read_metrics(run / "metrics.jsonl")
    assert_same(rows[:STEPS], finished.rows)
    assert len(rows) == STEPS + 1


class Tries:
    """One command line, started again and again; ``nodes`` torchruns of one rank each, or plain python for 1."""

    def __init__(self, command: list[str], *, nodes: int) -> None:
        self._command, self._nodes = command, nodes

    def start(self) -> list[subprocess.Popen[str]]:
        return [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for command in self._commands()
        ]

    def finish(self) -> float:
        """Until it ends by itself, well; in seconds."""
        began = time.monotonic()
        processes = self.start()
        for process in processes:
            said, _ = process.communicate(timeout=400)
            assert process.returncode == 0, said
        return time.monotonic() - began

    def kill_after(self, seconds: float) -> None:
        """SIGKILL to everything, at once; earlier where it ended by itself."""
        processes = self.start()
        until = time.monotonic() + seconds
        wait_for(lambda: time.monotonic() >= until or all(p.poll() is not None for p in processes), seconds=400.0)
        families = []
        for process in processes:
            if process.poll() is None:
                own = psutil.Process(process.pid)
                families += [own, *own.children(recursive=True)]
        for one in families:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        for process in processes:
            process.communicate()

    def _commands(self) -> list[list[str]]:
        if self._nodes == 1:
            return [self._command]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        python, *rest = self._command
        outer = [python, "-m", "torch.distributed.run", "--nnodes", str(self._nodes), "--nproc-per-node", "1",
                 "--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank"]  # fmt: skip
        return [[*outer, str(node), *rest] for node in range(self._nodes)]


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_command_killed_five_times_ends_in_the_same_rows(finished: Finished, tmp_path: Path, nodes: int) -> None:
    """Claim: ``--resume auto`` is the first and every later try, whenever a SIGKILL comes, before a checkpoint too.

    Two nodes are two torchruns on this host.
    """
    output = tmp_path / "run"
    flags = ("--data", str(finished.data), "--steps", str(STEPS), "--output", str(output), "--resume", "auto", *SIZES)
    command = finished.kind.command(*flags, "--tp", str(nodes), *finished.kind.flags)
    tries = Tries(command, nodes=nodes)
    seconds = tries.finish()
    expected = read_metrics(output / "metrics.jsonl")
    shutil.rmtree(output)
    moments = random.Random(5)
    for _ in range(5):
        tries.kill_after(moments.uniform(0.3, 1.0) * seconds)
    tries.finish()
    assert_same(read_metrics(output / "metrics.jsonl"), expected)
    if nodes == 1:
        assert_same(expected, finished.rows)
