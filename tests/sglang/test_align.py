"""``run_align.py --rollout sglang`` with two servers at TP2·PP2: what the servers report is what Megatron computes.

Tolerance 1e-4 nats on the mean difference of log-probs that every step measures, fp32; the second step samples with
weights that the first one changed. Blind to several hosts and to CUDA.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron.observability.metrics import read_metrics
from prism_megatron.rollout.sglang.arguments import PYTHON
from tests.sglang.conftest import REPOSITORY

FLAGS = "--tp 2 --pp 2 --dtype fp32 --steps 2 --prompts-per-step 4 --rollouts-per-prompt 4 --tokens-per-microbatch 512"
# At 1, nobody would notice who left it out of the log-probs.
FLAGS += " --temperature 0.8"


def command_lines() -> list[str]:
    """Of all processes there are."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # ended meanwhile
    return lines


@pytest.mark.parametrize("transport", ["disk", "group"])
def test_two_servers_sample_for_four_ranks(transport: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    servers = f"--rollout sglang --rollout-servers 2 --rollout-sync {transport} --rollout-python {REPOSITORY / PYTHON}"
    servers += " --rollout-probe-every 1 --rollout-probe-bound 1e-4"
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "run_align.py", *FLAGS.split(), *servers.split(), "--output", output],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_metrics(output / "metrics.jsonl")
    assert [(row["sampled_version"], row["policy_version"]) for row in rows] == [(0, 1), (1, 2)]
    assert all(0.0 < row["logprob_gap"] <= 1e-4 for row in rows), [row["logprob_gap"] for row in rows]
    assert not list((output / "rollout").glob("weights-*")), "spooled weights were left behind"
    assert not [line for line in command_lines() if str(output) in line], "servers were left running"
