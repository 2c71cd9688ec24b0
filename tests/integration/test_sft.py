"""Supervised fine-tuning through its command line: the same in every layout, and it goes on with the next pack.

Blind spot: how well it teaches; ``docs/limits.md`` says what has been measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.index.index import Index
from prism_megatron.observability.metrics import read_metrics
from tests.integration.test_align_records import write_records
from tests.integration.test_resume import assert_same

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_sft.py"
STEPS = 4


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *flags], capture_output=True, text=True, timeout=300, check=False)


def ran(*flags: str) -> str:
    result = run(*flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@dataclass(frozen=True)
class Trained:
    """A run on records that saved every step."""

    folder: Path
    flags: tuple[str, ...]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("sft")
    write_records(root / "set", 40)
    flags = ("--data", str(root / "set"), "--index", str(root / "index"), "--dtype", "fp32", "--max-tokens", "700",
             "--rows-per-step", "2", "--epochs", "3", "--validation-share", "0.2", "--save-every", "1",
             "--eval-every", "2")  # fmt: skip
    ran(*flags, "--steps", str(STEPS), "--output", str(root / "run"))
    return Trained(root / "run", flags, read_metrics(root / "run" / "metrics.jsonl"))


def assert_close(folder: Path, trained: Trained) -> None:
    rows = read_metrics(folder / "metrics.jsonl")
    assert len(rows) == len(trained.rows)
    for row, wanted in zip(rows, trained.rows, strict=True):
        for name in {"loss", "label_tokens", "samples", "tokens", "images", "held_out/loss"} & wanted.keys():
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), name


def test_records_are_learned_and_the_frozen_parts_stay(trained: Trained) -> None:
    rows, summary = trained.rows, json.loads((trained.folder / "summary.json").read_text())
    assert [row["policy_updated"] for row in rows] == [1] * STEPS
    assert ["held_out/loss" in row for row in rows] == [True] * 4
    assert summary["best_held_out_loss"] == min(row.get("held_out/loss", 99.0) for row in rows)
    assert all(0.0 < row["loss"] < 1.0 and 0.5 < row["row_fill"] <= 1.0 for row in rows)
    assert summary["exported"] == "fine-tuned policy" and summary["data"]["kept"] + summary["data"]["held_out"] == 40
    before, after = (load_file(at / "model.safetensors") for at in (MINI_FOLDER / "base", trained.folder / "hf"))
    same = {name for name in before if torch.equal(before[name].float(), after[name].float())}
    assert same == {name for name in before if name.startswith("model.visual.")}


@pytest.mark.parametrize("layout", [("--tp", "2"), pytest.param(("--pp", "2", "--cp", "2"), marks=pytest.mark.long)])
def test_another_layout_learns_the_same(trained: Trained, layout: tuple[str, ...], tmp_path: Path) -> None:
    """1e-4: fp32 sums in another order, over four updates."""
    ran(*trained.flags, *layout, "--steps", str(STEPS), "--output", str(tmp_path / "run"))
    assert_close(tmp_path / "run", trained)


def test_a_run_goes_on_with_the_pack_that_is_next(trained: Trained, tmp_path: Path) -> None:
    """Claim: also with other reading processes; every row is that of the run that was never interrupted."""
    shutil.copytree(trained.folder, tmp_path / "run")
    for step in range(2, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    ran("--load", str(tmp_path / "run"), "--readers", "2")
    assert_same(read_metrics(tmp_path / "run" / "metrics.jsonl"), trained.rows)


def test_images_are_cut_by_the_flags_of_pixels(trained: Trained, tmp_path: Path) -> None:
    """Claim: with --max-pixels of one token every image has one, in an index of its own, and a run does not go on with
    another limit unless it is told to."""
    index = tmp_path / "index"
    ran(
        *trained.flags, "--index", str(index), "--max-pixels", "1024", "--steps", "1", "--output", str(tmp_path / "run")
    )
    (found,) = index.iterdir()
    assert set(Index(found).column("visual_tokens").tolist()) == {1}
    result = run("--load", str(trained.folder), "--max-pixels", "1024", "--epochs", "4")
    assert result.returncode == 2 and "max-pixels" in result.stderr, result.stdout + result.stderr


@pytest.mark.long
def test_more_data_parallel_ranks_go_on_with_the_same_packs(trained: Trained, tmp_path: Path) -> None:
    """Claim: samples and losses are those of one rank, where a run of one rank goes on with two (1e-4: sums)."""
    shutil.copytree(trained.folder, tmp_path / "run")
    for step in range(2, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TOOL),
               "--load", str(tmp_path / "run")]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_close(tmp_path / "run", trained)


def test_features_from_disk_train_the_same(trained: Trained, tmp_path: Path) -> None:
    """Claim: a run that keeps features, and one that finds them all, in another layout too, end as one without."""
    flags = (*trained.flags, "--steps", str(STEPS), "--cache-vision", str(tmp_path / "features"))
    ran(*flags, "--output", str(tmp_path / "first"))
    ran(*flags, "--tp", "2", "--output", str(tmp_path / "second"))
    for name in ("first", "second"):
        assert_close(tmp_path / name, trained)
    found = [(row["vision_cache/found"], row["vision_cache/images"])
             for row in read_metrics(tmp_path / "second" / "metrics.jsonl")]  # fmt: skip
    assert all(these == all_of_them > 0 for these, all_of_them in found)


def test_what_cannot_work_is_one_line(tmp_path: Path) -> None:
    write_records(tmp_path / "set", 3)
    data = ("--data", str(tmp_path / "set"), "--output", str(tmp_path / "run"))
    for flags, words in (
        (("--data", str(tmp_path / "none")), "does not exist; name a file or a folder of records"),
        ((*data, "--freeze", "router"), "--freeze router is for models with experts"),
        ((*data, "--repeats", "x"), "SOURCE=TIMES expected"),
        ((*data, "--weights", "made/train=1", "--repeats", "made/train=1"), "--weights and --repeats both say"),
        ((*data, "--max-pixels", "1000"), "--max-pixels 1000 must be at least 1024"),
        ((*data, "--rows-per-step", "3", "--pp", "2", "--vpp", "2"), "--rows-per-step 3 must be a multiple of 2"),
        ((*data, "--max-tokens", "10", "--index", str(tmp_path / "index")), "no record of the train part can be used"),
        (("--epochs", "2"), "--epochs is for --data"),
        (("--validation-share", "0.5", "--steps", "1"), "--validation-share is for --data"),
        (("--readers", "3", "--steps", "1"), "--readers is for --data"),
        ((*data, "--validation-share", "0", "--eval-every", "7"), "--eval-every is about rows that are held out"),
        ((*data, "--cache-vision", str(tmp_path), "--freeze", "vision"), "this run trains the projector; add --freeze"),
        ((*data, "--cache-vision-gb", "1"), "--cache-vision-gb bounds the folder of --cache-vision"),
    ):
        result = run(*flags)
        assert result.returncode == 2, result.stdout + result.stderr
        (line,) = result.stderr.splitlines()
        assert words in line
        assert not (tmp_path / "run").exists()
