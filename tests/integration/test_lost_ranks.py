"""A rank, or all of a host's, that is gone: one line names it and says how to go on (blind spot: a second host)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from prism_megatron.observability.metrics import read_metrics
from tests.waiting import wait_for

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_align.py"
SMALL = (
    "--prompts-per-step",
    "2",
    "--rollouts-per-prompt",
    "2",
    "--dtype",
    "fp32",
    "--steps",
    "400",
    "--save-every",
    "1",
)


def start(output: Path, *outer: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *outer, str(TOOL), *SMALL, "--tp", "2", "--output", str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until_saved(output: Path, *processes: subprocess.Popen[str]) -> None:
    """Until the run has saved twice, and so certainly once."""
    root = output / "checkpoints"

    def ready() -> bool:
        ended = any(process.poll() is not None for process in processes)
        return ended or (root.is_dir() and len(list(root.glob("step_*/state.json"))) >= 2)

    wait_for(ready, seconds=300.0)
    for process in processes:
        assert process.poll() is None, process.communicate()


def ranks_below(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The ranks that a torchrun started."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        environment = child.environ()
        if "RANK" in environment and str(TOOL) in child.cmdline():
            found[int(environment["RANK"])] = child
    return found


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_a_lost_rank_is_named_above_any_traceback(tmp_path: Path, victim: int) -> None:
    output = tmp_path / "run"
    process = start(output, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    wait_until_saved(output, process)
    ranks_below(process)[victim].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    before, _, _ = errors.partition("Traceback")
    assert (
        f"error: rank {victim} on {socket.gethostname()} ended without a word; go on with `torchrun --nproc-per-node 2 "
        f"{TOOL} --load {output}`"
    ) in before


def test_a_rank_that_the_command_started_itself(tmp_path: Path) -> None:
    """Claim: the launcher names it, in one line, before the other rank's complaint about the broken connection."""
    output = tmp_path / "run"
    process = start(output)
    wait_until_saved(output, process)
    servers = [child for child in psutil.Process(process.pid).children() if child.children()]
    ranks = sorted((child for server in servers for child in server.children()), key=lambda child: child.pid)
    ranks[-1].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines() == [f"rank 1 was ended by SIGKILL; go on with `python {TOOL} --load {output}`"]


@pytest.mark.long
def test_two_torchruns_of_which_one_is_gone(tmp_path: Path) -> None:
    """Claim: the ranks of the other one name those that are lost, and a resume of both goes on.

    Two nodes by hand on one host, so that the lost ranks are seen to be gone.
    """
    output = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    outer = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
             "--master-port", str(port)]  # fmt: skip
    nodes = [start(output, *outer, "--node-rank", str(rank)) for rank in (0, 1)]
    try:
        wait_until_saved(output, *nodes)
        lost = psutil.Process(nodes[1].pid)
        for one in [*lost.children(recursive=True), lost]:
            one.kill()
        _, errors = nodes[0].communicate(timeout=180)
        assert nodes[0].returncode != 0
        assert f"error: rank 1 on {socket.gethostname()} ended without a word; go on with `" in errors
        assert "by the same torchrun on every host" in errors
    finally:
        for process in nodes:
            process.kill()
            process.communicate()
    played = len(read_metrics(output / "metrics.jsonl"))
    again = subprocess.run(
        [sys.executable, str(TOOL), "--load", str(output), "--tp", "2", "--steps", str(played + 1)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((output / "summary.json").read_text())["ended"] == "done"
