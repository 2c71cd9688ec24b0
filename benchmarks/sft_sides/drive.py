"""Starts the sides, each in a process and an environment of its own, and has them take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sft_sides.rounds import StepTaken

ROOT = Path(__file__).resolve().parents[2]
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
TORCHVISION_FIX = ROOT / "prism_megatron" / "rollout" / "sglang" / "cpu_stand_ins"
"""A sitecustomize for torchvision's CUDA wheel beside a CPU build of torch."""
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""glibc keeps what is freed. It makes TRL up to 1.45 times as fast."""


@dataclass(frozen=True)
class Side:
    """Who trains: the module of ``benchmarks``, its precision and its way."""

    name: str
    module: str
    dtype: str
    way: str

    @property
    def is_ours(self) -> bool:
        return self.module.endswith(".ours_side")

    @property
    def environment(self) -> dict[str, str]:
        """Variables beside the caller's own."""
        paths = [ROOT] if self.is_ours else [TORCHVISION_FIX, ROOT]
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "CUDA_VISIBLE_DEVICES": "",
        }
        return own | (KEEP_MEMORY if self.module.endswith(".trl_side") else {})


class SideError(Exception):
    """A side ended where it should have answered."""


class Running:
    """A side's process, which waits whenever it is not its turn."""

    def __init__(self, side: Side, work: Path, model: str, steps: int) -> None:
        self.side, self.taken = side, list[StepTaken]()
        self._errors = work / f"{side.name}.stderr".replace(" ", "-")
        python = sys.executable if side.is_ours else str(TRL_PYTHON)
        command = [python, "-m", f"benchmarks.{side.module}", work, model, side.dtype, side.way, steps]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=os.environ | side.environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def ready(self) -> None:
        """Return when it is."""
        self._answer()

    def turn(self, steps: int) -> None:
        """Have it take so many steps while everyone else waits."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.taken += self._answer()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _answer(self) -> list[StepTaken]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._errors.read_text(errors="replace").strip().splitlines()[-1:]
            raise SideError(f"{self.side.name} ended: {''.join(last)} (all of it: {self._errors})")
        return [StepTaken(**step) for step in json.loads(line)]


def take_turns(
    sides: Sequence[Side], work: Path, model: str, *, steps: int, steps_in_turn: int
) -> Mapping[str, list[StepTaken]]:
    """What every side's steps took. Raises SideError."""
    with ExitStack() as stack:
        running = []
        for side in sides:
            one = Running(side, work, model, steps)
            stack.callback(one.close)
            one.ready()
            running.append(one)
        for first in range(0, steps, steps_in_turn):
            for one in running:
                one.turn(min(steps_in_turn, steps - first))
        return {one.side.name: one.taken for one in running}
