"""A run that is asked to end does so after a whole step, keeps it, and goes on from there as if it never had.

A signal to one rank of several, in every phase of a step; and signals to commands, as users and schedulers send them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.testing import GlooWorld
from tests.integration.stopping_ranks import config, play, play_and_stop
from tests.integration.test_resume import assert_same
from tests.waiting import wait_for

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_align.py"
PHASES = ("rollout", "discriminator", "policy", "weight_sync", "checkpoint")
SMALL = ("--prompts-per-step", "2", "--rollouts-per-prompt", "2", "--dtype", "fp32", "--steps", "400",
         "--save-every", "100")  # fmt: skip
# A shell's background jobs, and what they start, ignore Ctrl-C.
HEARS_CTRL_C = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Ranks:
    """Those of one layout, and the rows of a run that nothing broke."""

    gloo: GlooWorld
    layout: ParallelConfig
    unbroken: list[dict[str, Any]]


@pytest.fixture(
    scope="module", params=[(2, 2), pytest.param((4, 2), marks=pytest.mark.slow)], ids=["TP2·PP2", "TP4·PP2"]
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    tp, pp = request.param
    layout, output = ParallelConfig(tp=tp, pp=pp), tmp_path_factory.mktemp("unbroken") / "run"
    with GlooWorld(tp * pp) as gloo:
        assert set(gloo.run(play, config(layout, output=output), parallel=layout)) == {""}
        yield Ranks(gloo, layout, read_metrics(output / "metrics.jsonl"))


@pytest.mark.long
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGINT"]
)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_costs_no_step(ranks: Ranks, tmp_path: Path, phase: str, number: signal.Signals) -> None:
    """Claim: one rank alone hears it, all end together, and the rows that follow are those of an unbroken run."""
    gloo, layout, output = ranks.gloo, ranks.layout, tmp_path / "run"
    said = gloo.run(play_and_stop, config(layout, output=output), phase, int(number), parallel=layout)
    step = 1 if phase == "weight_sync" else 2  # weights are handed over once before the first step
    assert {one.partition(" after step ")[0] for one in said} == {f"RunStopped: stopped by {number.name}"}
    assert said[0].startswith(f"RunStopped: stopped by {number.name} after step {step}; go on with `")
    assert len(set(said)) == 1
    assert len(read_metrics(output / "metrics.jsonl")) == step
    assert (output / "checkpoints" / f"step_{step:06d}" / "state.json").is_file()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == step and summary["ended"].startswith(f"stopped by {number.name}")
    assert not (output / "hf").exists(), "a run that is not finished exports nothing"
    assert set(gloo.run(play, config(layout, load=output), parallel=layout)) == {""}
    assert_same(read_metrics(output / "metrics.jsonl"), ranks.unbroken)


OUTER = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  "--nproc-per-node", "2"]}  # fmt: skip


def started(output: Path, outer: str, *flags: str) -> subprocess.Popen[str]:
    """A run of two ranks that has played two steps; in a process group of its own, as a terminal would have it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C, *OUTER[outer], str(TOOL), *SMALL, "--tp", "2", "--output", str(output),
         *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = output / "metrics.jsonl"
    wait_for(
        lambda: process.poll() is not None or (metrics.exists() and len(read_metrics(metrics)) >= 2), seconds=300.0
    )
    assert process.poll() is None, process.communicate()
    return process


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    own = psutil.Process(process.pid)
    return [own, *own.children(recursive=True)]


def assert_gone(processes: list[psutil.Process]) -> None:
    wait_for(lambda: not psutil.wait_procs(processes, timeout=0.0)[1], seconds=60.0)


def assert_kept(output: Path) -> int:
    """That every step with a row is kept in a checkpoint, with summary and nothing half-written; how many there are."""
    played = len(read_metrics(output / "metrics.jsonl"))
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step_{played:06d}"]
    assert json.loads((output / "summary.json").read_text())["steps"] == played
    return played


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        pytest.param(signal.SIGTERM, False, id="SIGTERM"),
        pytest.param(signal.SIGINT, True, id="SIGINT to the group"),
        pytest.param(signal.SIGTERM, True, id="SIGTERM to the group", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, False, id="SIGINT", marks=pytest.mark.long),
    ],
)
def test_a_command_that_is_asked_to_end_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    """Claim: status 3, one line, nothing lost and no process left: by kill, by Ctrl-C, by a scheduler to the group."""
    output = tmp_path / "run"
    process = started(output, "python")
    family = family_of(process)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    played = assert_kept(output)
    (line,) = errors.splitlines()
    assert line == f"stopped by SIGTERM after step {played}; go on with `python {TOOL} --load {output}`"
    assert_gone(family)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_torchrun_passes_the_wish_on(tmp_path: Path, number: signal.Signals) -> None:
    """Claim: the same under torchrun, which adds its own report of the signal it got."""
    output = tmp_path / "run"
    process = started(output, "torchrun")
    family = family_of(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    played = assert_kept(output)
    said = [line for line in errors.splitlines() if line.startswith("stopped by ")]
    assert said == [
        f"stopped by {number.name} after step {played}; go on with `torchrun --nproc-per-node 2 {TOOL} --load {output}`"
    ]
    assert_gone(family)


@pytest.mark.long
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Claim: whoever does not want to wait for the step need not; what was saved before is whole."""
    output = tmp_path / "run"
    process = started(output, "python", "--save-every", "1")
    family = family_of(process)
    ranks = [rank for below in family[0].children() for rank in below.children()]  # of the fork server
    assert len(ranks) == 2
    for rank in ranks:
        rank.suspend()  # a step that takes for ever
    process.send_signal(signal.SIGTERM)
    later = time.monotonic() + 1.1
    wait_for(lambda: time.monotonic() >= later)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors == ""
    assert_gone(family)
    saved = list((output / "checkpoints").glob("step_*[0-9]"))
    assert saved and all((path / "state.json").is_file() for path in saved)


@pytest.mark.long
def test_time_that_is_up_ends_a_run_within_a_step(tmp_path: Path) -> None:
    """Claim: ``--max-minutes`` counts from when the command's processes began, and ends with what a signal does."""
    output = tmp_path / "run"
    command = [sys.executable, str(TOOL), *SMALL, "--output", str(output), "--max-minutes", "1",
               "--save-every", "100000"]  # fmt: skip
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 3, result.stdout + result.stderr
    assert time.monotonic() - began >= 60.0
    played = assert_kept(output)
    assert result.stderr.startswith(f"stopped by --max-minutes 1 after step {played}; go on with `")
