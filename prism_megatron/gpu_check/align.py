"""A few steps of alignment on the mini world, by its own command."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from prism_megatron.gpu_check.rows import Row, failed, measured, within

STEPS = 3
GAP = 1e-4
"""Nats a token that the sampler's log-probs may be away from the trainer's in fp32: two implementations round apart by
far less, and another mask, image or position is tenths of a nat."""
_FINITE = ("discriminator_loss", "policy_loss", "policy_grad_norm", "discriminator_grad_norm")


def check_align(output: Path) -> Iterator[Row]:
    """Runs ``prism-align`` in ``output``, which holds its lines and rows afterwards."""
    shutil.rmtree(output, ignore_errors=True)  # an earlier run's: a finished one is not begun again
    output.mkdir(parents=True)
    command = [
        sys.executable, "-m", "prism_megatron", "align", "--steps", str(STEPS), "--prompts-per-step", "8",
        "--rollouts-per-prompt", "4", "--eval-prompts", "0", "--output", str(output / "run"),
    ]  # fmt: skip
    with (output / "console.log").open("w", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        yield failed("alignment of the mini world", f"status {status}; see {output / 'console.log'}")
        return
    rows = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "policy_loss" in row]
    finite = [row for row in steps if all(row[name] is not None and math.isfinite(row[name]) for name in _FINITE)]
    yield within("steps with finite losses and gradients", len(finite), STEPS, at_least=True)
    yield within("log-probs of sampler and trainer apart", max(row["logprob_gap"] for row in steps), GAP, "nats")
    yield measured("accuracy of the discriminator, last step", steps[-1]["perception/accuracy"], "", "perception")
