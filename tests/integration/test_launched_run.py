"""A run that ``examples/launch/run_stage.sh`` starts stops at SIGTERM after its step, and the same line ends it.

By the real torchrun, on the mini. Blind spot: several hosts, whose scripts are started by stand-ins elsewhere
(``tests/unit/examples/test_launch_scripts.py``).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron.observability.metrics import read_metrics
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "launch" / "run_stage.sh"
STEPS = 60


@pytest.mark.long
def test_one_line_stops_and_ends_a_run(tmp_path: Path) -> None:
    """Claim: SIGTERM to the script gives status 3 after a whole step, with ranks that torchrun has not ended; the same
    line goes on to the last step, with status 0 and every row once.
    """
    config, output = tmp_path / "own.yaml", tmp_path / "runs" / "sft"
    config.write_text(f"steps: {STEPS}\ndrift_scenes: 0\ndata: {{rows_per_step: 2}}\n", encoding="utf-8")
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"NPROC": "2", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PATH": places, **own}
    words = [str(SCRIPT), "sft", str(config), str(output)]

    first = subprocess.Popen(words, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    rows = output / "metrics.jsonl"
    wait_for(lambda: first.poll() is not None or (rows.is_file() and rows.stat().st_size > 0), seconds=240)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=240)
    assert first.returncode == 3, said
    assert "stopped by SIGTERM" in said and "the same line goes on" in said
    played = len(read_metrics(rows))
    assert 0 < played < STEPS

    again = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in read_metrics(rows)] == list(range(STEPS))
    assert not Path(f"{output}.pid").exists()


def free_port() -> int:
    """A port of this host that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
