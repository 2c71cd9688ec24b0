"""The job that is played on two hosts: a few steps of the mini's alignment, by the line that recipes start it with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.two_hosts.cuts import Cut
from tests.two_hosts.hosts import Host
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "launch" / "run_stage.sh"
PORT = 29500
SMALL = ("--save-every", "1", "--prompts-per-step", "2", "--rollouts-per-prompt", "2",
         "--dtype", "fp32", "--format-sft", "0")  # fmt: skip
LAYOUTS: Mapping[str, tuple[str, ...]] = {"tp2": ("--tp", "2"), "pp2": ("--pp", "2")}
RANKS_PER_HOST = 2
PATIENCE_SECONDS = 1200.0
_TORCHRUN = """
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" --node-rank "$NODE_RANK" --max-restarts 0 \\
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$@"
"""
"""As ``run_stage.sh`` starts it, but for the tool."""


@dataclass(frozen=True)
class Job:
    """A run and its flags; ``config`` is an empty file, which the recipes' line wants."""

    config: Path
    output: Path
    flags: Sequence[str]

    def flags_of(self) -> list[str]:
        """As ``run_stage.sh`` puts them together."""
        return ["--config", str(self.config), "--output", str(self.output), "--resume", "auto", *self.flags]


@dataclass
class Launched:
    """A launcher on one host, and the file that it and its ranks write to."""

    process: subprocess.Popen[bytes]
    file: Path
    ended: float | None = field(default=None)
    """by time.monotonic"""

    @property
    def said(self) -> str:
        return self.file.read_text(encoding="utf-8", errors="replace")

    def has_ended(self) -> bool:
        """Takes the time at which it is seen first."""
        if self.ended is None and self.process.poll() is not None:
            self.ended = time.monotonic()
        return self.ended is not None


def launch(job: Job, hosts: Sequence[Host], said: Path) -> list[Launched]:
    """The recipes' line on each of the ``hosts``; what they say goes to files in ``said``."""
    return _start(hosts, [str(SCRIPT), "align", str(job.config), str(job.output), *job.flags], said)


def launch_to_stand(job: Job, hosts: Sequence[Host], cut: Cut, step: int, said: Path) -> list[Launched]:
    """The same, with ranks that stand still where they are to be cut, in ``step`` (from 1)."""
    tool = ["-m", "tests.two_hosts.rank", cut.place, str(step), str(cut.host), str(said)]
    return _start(hosts, ["sh", "-c", _TORCHRUN, "torchrun", *tool, *job.flags_of()], said)


def _start(hosts: Sequence[Host], words: Sequence[str], said: Path) -> list[Launched]:
    said.mkdir(parents=True)
    launched = []
    for number, host in enumerate(hosts):
        own = {
            "NNODES": str(len(hosts)), "NODE_RANK": str(number), "MASTER_ADDR": hosts[0].address,
            "NPROC": str(RANKS_PER_HOST * 2 // len(hosts)), "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": host.cable, "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }  # fmt: skip
        path = said / f"host-{number}.txt"
        with path.open("wb") as file:
            process = subprocess.Popen(
                host.command(words), stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **own}, cwd=ROOT
            )
        launched.append(Launched(process, path))
    return launched


def wait_until_standing(cut: Cut, launched: Sequence[Launched], said: Path) -> None:
    """Until the ranks that are to be cut are at their place. AssertionError where the run has ended before."""
    wanted = 1 if cut.place == "commit" else RANKS_PER_HOST

    def standing() -> bool:
        assert not any(one.has_ended() for one in launched), "\n".join(one.said for one in launched)
        return len(list(said.glob("rank-*"))) >= wanted

    wait_for(standing, seconds=PATIENCE_SECONDS, poll_seconds=0.1)


def wait_until_ended(launched: Sequence[Launched], *, seconds: float = PATIENCE_SECONDS) -> list[int]:
    """The statuses. AssertionError where they have not ended in time."""

    def all_ended() -> bool:
        return sum(one.has_ended() for one in launched) == len(launched)

    wait_for(all_ended, seconds=seconds, poll_seconds=0.1)
    return [one.process.wait() for one in launched]
