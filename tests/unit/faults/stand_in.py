"""Stands for a tool, in a moment and without torch: plays its steps, and goes on from those in its folder.

``python stand_in.py FOLDER LIE``: with a lie it does on purpose what a trial has to notice.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STEPS = 6


def play(folder: Path, lie: str) -> None:
    rows = folder / "metrics.jsonl"
    folder.mkdir(exist_ok=True)
    done = len(rows.read_text().splitlines()) if rows.exists() else 0
    goes_on = done > 0
    if lie == "step twice" and goes_on:
        done -= 1
    if lie == "leaves a process" and goes_on:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    if lie == "cannot go on" and goes_on:
        sys.exit("error: cannot go on")
    for step in range(done, STEPS):
        time.sleep(0.1)  # a span: what a trial strikes into
        loss = 1.0 / (1 + step) + (1e-12 if lie == "other figure" and goes_on else 0.0)
        with rows.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss, "seconds/step": time.monotonic()}) + "\n")
    if lie == "half a checkpoint" and goes_on:
        (folder / "checkpoints" / "step_000006").mkdir(parents=True)
    if lie == "hidden rest" and goes_on:
        (folder / "checkpoints" / ".step_000006.saving").mkdir(parents=True)


if __name__ == "__main__":
    if sys.argv[2] == "kills itself":
        os.kill(os.getpid(), signal.SIGKILL)
    play(Path(sys.argv[1]), sys.argv[2])
