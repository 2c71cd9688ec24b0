"""Prompts are selected through the command line, and verifiable rewards train on those alone.

Blind spot: servers (``tests/unit/stages/test_select_prompts.py`` says what else is not asked here).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from tests.integration.test_align_records import write_records
from tests.integration.test_rlvr import ran as ran_rlvr
from tests.integration.test_rlvr import rows_of
from tests.integration.test_rlvr import run as run_rlvr
from tests.waiting import wait_for

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "select_prompts.py"
POLICY = ("--model", str(MINI_FOLDER / "aligned"), "--dtype", "fp32", "--system-prompt", "None",
          "--max-response-tokens", "96")  # fmt: skip
BATCH = 2
SIZES = ("--prompts-per-step", str(BATCH), "--rollouts-per-prompt", "4", "--reward",
         "tests.integration.rewards_for_rlvr:by_length")  # fmt: skip
RESULT = ("pass_rates.jsonl", "selected.jsonl", "summary.json")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(folder: Path, output: Path, *flags: str) -> list[str]:
    return [sys.executable, str(TOOL), *POLICY, *SIZES, "--data", str(folder), "--output", str(output), *flags]


def run(folder: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, output, *flags), capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT
    )


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULT}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("select") / "set"
    write_records(folder, 12)
    return folder


@pytest.fixture(scope="module")
def selected(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection that nothing interrupted."""
    folder = tmp_path_factory.mktemp("selected") / "out"
    result = run(records, folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "prompts have a pass rate from 0.2 to 0.8" in result.stdout
    return folder


def test_prompts_within_the_bounds_are_selected(selected: Path) -> None:
    """Claim: the file, the pass rates and the histogram say the same."""
    rates = [json.loads(line) for line in (selected / "pass_rates.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (selected / "selected.jsonl").read_text().splitlines()]
    summary = json.loads((selected / "summary.json").read_text())
    assert [one["id"] for one in kept] == [one["id"] for one in rates if 0.2 <= one["passes"] / 4 <= 0.8]
    assert 0 < len(kept) < len(rates) == summary["prompts"], "blind: all prompts are alike"
    assert summary["selected"] == len(kept)
    assert sum(row["prompts"] for row in summary["histogram"]) == len(rates)
    assert all(one["rollouts"] == 4 and one["tokens"] > 0 for one in rates)


def test_a_killed_selection_goes_on_to_the_same_files(records: Path, selected: Path, tmp_path: Path) -> None:
    """Claim: after SIGKILL and half a line, the same command asks the rest alone, and files are equal to the byte."""
    output, seed = tmp_path / "out", random.Random(int(os.environ.get("PRISM_TEST_SEED", "20260")))
    rates = output / "pass_rates.jsonl"
    wanted = BATCH * seed.randrange(1, 4)
    process = subprocess.Popen(command(records, output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)  # fmt: skip

    def answered() -> int:
        return rates.read_bytes().count(b"\n") if rates.exists() else 0

    wait_for(lambda: answered() >= wanted or process.poll() is not None, seconds=300.0)
    process.kill()
    _, errors = process.communicate()
    there = answered()
    assert wanted <= there < len((selected / "pass_rates.jsonl").read_bytes().splitlines()), errors
    assert not (output / "selected.jsonl").exists()
    with rates.open("ab") as file:
        file.write(b'{"id": "made-')
    refused = run(records, output, "--temperature", "0.5")
    assert "--temperature was 1 and is 0.5" in refused.stderr and refused.returncode == 2
    result = run(records, output)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"; {there - there % BATCH} of " in result.stdout, "prompts that were answered are asked again"
    assert read(output) == read(selected)


def test_other_bounds_ask_nothing_again(records: Path, selected: Path) -> None:
    """Claim: the same folder is chosen from anew, without a policy; no prompt is an error that says so."""
    before = read(selected)
    wide = run(records, selected, "--keep-from", "0", "--keep-to", "1")
    assert wide.returncode == 0 and "of the last answers" not in wide.stdout, wide.stdout + wide.stderr
    summary = json.loads((selected / "summary.json").read_text())
    assert summary["selected"] == summary["prompts"]
    none = run(records, selected, "--keep-from", "0.3", "--keep-to", "0.4")
    assert none.returncode == 2 and "no prompt has a pass rate from 0.3 to 0.4" in none.stderr
    assert (selected / "selected.jsonl").read_bytes() == b""
    assert run(records, selected).returncode == 0
    assert read(selected) == before


def test_ranks_share_the_prompts(records: Path, selected: Path, tmp_path: Path) -> None:
    """Claim: two ranks find what one does (the mini's answers do not hang on rounding)."""
    result = run(records, tmp_path / "out", "--ranks", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert read(tmp_path / "out") == read(selected)


def test_verifiable_rewards_train_on_what_is_selected(records: Path, selected: Path, tmp_path: Path) -> None:
    flags = (*POLICY, "--steps", "2", "--prompts-per-step", "2", "--rollouts-per-prompt", "2", "--eval-prompts", "0",
             "--mini-batches", "1", "--data", str(records), "--reward",
             "tests.integration.rewards_for_rlvr:by_length")  # fmt: skip
    chosen = selected / "selected.jsonl"
    out = ran_rlvr(*flags, "--prompts", str(chosen), "--steps", "1", "--output", str(tmp_path / "run"))
    kept = len(chosen.read_text().splitlines())
    assert f"data: {kept} of 12 lines are used" in out and "not in --prompts" in out, out
    assert len(rows_of(tmp_path / "run")) == 1
    # Another file is another run.
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(chosen.read_text().splitlines(keepends=True)[:-1]))
    refused = run_rlvr("--load", str(tmp_path / "run"), "--steps", "2", "--prompts", str(fewer))
    assert refused.returncode == 2 and "--prompts was" in refused.stderr, refused.stderr
    chosen_before = chosen.read_text()
    copy = tmp_path / "copy.jsonl"
    copy.write_text(chosen_before + '{"id": "nobody"}\n')
    unknown = run_rlvr(*flags, "--prompts", str(copy), "--output", str(tmp_path / "no"))
    assert f"copy.jsonl:{kept + 1}: field id: 'nobody' is none of the training part" in unknown.stderr, unknown.stderr
    assert len(unknown.stderr.strip().splitlines()) == 1
