"""A run whose servers are gone, or whose spool's disk is full: one line with the server or the path, and how to go on.

The disk is a tmpfs of the test's own; skipped where this user may not mount one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.rollout.sglang.arguments import PYTHON
from tests.sglang.conftest import REPOSITORY
from tests.waiting import wait_for

TOOL = REPOSITORY / "tools" / "run_align.py"
FLAGS = ("--dtype", "fp32", "--prompts-per-step", "2", "--rollouts-per-prompt", "2", "--save-every", "1",
         "--rollout", "sglang", "--rollout-python", str(REPOSITORY / PYTHON))  # fmt: skip


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOL), *FLAGS, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def servers_of(output: Path) -> list[psutil.Process]:
    """The run's servers, by the file of arguments that each was given."""
    wanted = str(output / "rollout" / "server-")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(part.startswith(wanted) for part in command) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder for servers' logs and spools that takes less than the mini's weights."""
    place = tmp_path / "run" / "rollout"
    place.mkdir(parents=True)
    size = sum(path.stat().st_size for path in (MINI_FOLDER / "policy").glob("*.safetensors"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={size // 2048}k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_spool_that_does_not_fit_ends_the_run_in_a_line(small_disk: Path) -> None:
    output = small_disk.parent
    process = start("--steps", "2", "--output", str(output))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2, errors
    (line,) = errors.splitlines()
    assert f"the weights cannot be written to {small_disk}/weights-" in line
    assert "o space left on device" in line and "make room, then go on with `" in line and str(output) in line
    assert not servers_of(output)


def test_a_server_that_dies_again_and_again_ends_the_run_in_a_line(tmp_path: Path) -> None:
    """Claim: it is restarted as often as was asked; then the line names it, and steps that were saved are whole."""
    output = tmp_path / "run"
    process = start("--steps", "400", "--rollout-restarts-per-hour", "3", "--output", str(output))
    metrics = output / "metrics.jsonl"
    wait_for(
        lambda: process.poll() is not None or (metrics.exists() and len(read_metrics(metrics)) >= 1), seconds=500.0
    )
    while process.poll() is None:
        for server in servers_of(output):
            server.kill()
        wait_for(lambda: process.poll() is not None or bool(servers_of(output)), seconds=500.0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    (line,) = errors.splitlines()
    assert "SGLang server 0 died, and servers were restarted 3 times within an hour; see " in line
    assert re.search(rf"go on with `python {TOOL} --load {output}`$", line), line
    played = len(read_metrics(metrics))
    assert (output / "checkpoints" / f"step_{played:06d}" / "state.json").is_file()
