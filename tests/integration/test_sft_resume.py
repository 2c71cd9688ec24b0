"""Supervised fine-tuning killed again and again, going on with other ranks and readers, learns from each sample once.

Blind spot: what is lost with a machine, such as files that were never flushed; nothing here takes the power away.
"""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from prism_megatron.observability.metrics import read_metrics
from tests.integration.test_align_records import write_records
from tests.waiting import wait_for

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RECORDS, ROWS = 150, 4
TRIES = ((1, 0), (2, 2), (4, 1), (1, 3))
"""Data-parallel ranks and reading processes of each; all but the last are killed."""
COUNTS = ("samples", "tokens", "label_tokens", "images")
TOLERANCE = 1e-6
"""Of a loss. Ranks add up gradients in another order: with a rate of 1e-4 updates spread them by less than that."""


def command(ranks: int, *flags: str) -> list[str]:
    start = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]  # fmt: skip
    return [*start, str(TOOLS / "run_sft.py"), *flags]


def ran(ranks: int, *flags: str) -> None:
    result = subprocess.run(command(ranks, *flags), capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def killed_at(rows: int, output: Path, ranks: int, *flags: str) -> None:
    """SIGKILL to the whole family once the metrics have so many rows."""
    said = output.with_name("said.txt")
    with said.open("w") as stream:
        process = subprocess.Popen(
            command(ranks, *flags), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: len(rows_of(output)) >= rows or process.poll() is not None, seconds=400.0)
        assert process.poll() is None, f"it ended before it could be killed: {said.read_text()}"
    finally:
        family = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def rows_of(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


@pytest.mark.long
@pytest.mark.parametrize("form", [pytest.param("records", marks=pytest.mark.slow), "shards"])
def test_killed_runs_learn_from_each_sample_once(form: str, tmp_path: Path) -> None:
    """Claim: with 1, 2, 4 and 1 ranks, and other readers each time, rows are those of one rank left alone."""
    write_records(tmp_path / "records", RECORDS)
    if form == "shards":
        shard = [sys.executable, str(TOOLS / "data.py"), "shard", str(tmp_path / "records"), str(tmp_path / "shards"),
                 "--records-per-shard", "40"]  # fmt: skip
        subprocess.run(shard, capture_output=True, check=True, timeout=120)
    flags = ("--data", str(tmp_path / form), "--index", str(tmp_path / "index"), "--dtype", "fp32",
             "--max-tokens", "220", "--rows-per-step", str(ROWS), "--validation-share", "0.1", "--save-every", "2",
             "--eval-every", "3", "--policy.lr", "1e-4")  # fmt: skip
    ran(1, *flags, "--output", str(tmp_path / "whole"))
    whole = rows_of(tmp_path / "whole")
    output, moments, done = tmp_path / "run", random.Random(7), 0
    for ranks, readers in TRIES[:-1]:
        done = moments.randint(done + 2, done + 4)
        killed_at(done, output, ranks, *flags, "--output", str(output), "--resume", "auto", "--readers", str(readers))
    ranks, readers = TRIES[-1]
    assert done < len(whole) - 1, "every try had steps left"
    ran(ranks, *flags, "--output", str(output), "--resume", "auto", "--readers", str(readers))
    rows, kept = rows_of(output), sum(row["samples"] for row in whole)
    assert sum(row["samples"] for row in rows) == kept > 0.8 * RECORDS
    assert len(rows) == len(whole)
    for row, wanted in zip(rows, whole, strict=True):
        assert [row[name] for name in COUNTS] == [wanted[name] for name in COUNTS]
        for name in {"loss", "held_out/loss"} & wanted.keys():
            assert row[name] == pytest.approx(wanted[name], rel=TOLERANCE, abs=TOLERANCE)
