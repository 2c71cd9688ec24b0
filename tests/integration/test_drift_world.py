"""The second mini world's shipped weights do what it is for: the policy's mode has drifted, and only who sees knows.

Thresholds lie between what was measured (``docs/mini_world.md``) and what would spoil the world's use. Blind spot:
other seeds of the recipe than the one that ships.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_megatron.evaluation.health import Figures
from prism_megatron.experiments.mini_figures import OVER_ALL
from prism_megatron.testing import GlooWorld
from prism_megatron.types import TOWER_NAMES
from tests.integration.drift_ranks import WORLD, answer, score, warm_up_blind

ROOT = Path(__file__).resolve().parents[2]
SCENES, PROMPTS = 128, 48


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(2) as world:
        yield world


def test_fine_tuning_has_moved_the_mode(gloo: GlooWorld) -> None:
    """Claim: greedily the base is right about nearly all scenes, and the policy is wrong about most."""
    base, policy = (gloo.run(answer, name, SCENES)[0]["greedy"] for name in ("base", "policy"))
    assert min(base["caption exact"], base["answer right"]) >= 0.95
    assert policy["caption exact"] <= 0.15
    assert 0.3 <= policy["answer right"] <= 0.55


def test_the_discriminator_that_sees_knows_and_does_not_go_by_length(gloo: GlooWorld) -> None:
    """Claim: AUC inside held-out groups >= 0.85 for captions, >= 0.8 for reasoning; |r| of score and length <= 0.2."""
    figures = gloo.run(score, WORLD / "discriminator", PROMPTS)[0]
    assert aucs(figures)[0] >= 0.85 and aucs(figures)[1] >= 0.8
    assert lengths(figures) <= 0.2
    assert min(figures[f"{name}/auc_pairs"] or 0 for name in TOWER_NAMES) >= 150


@pytest.mark.slow
def test_a_discriminator_that_reads_text_alone_knows_nothing(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: after the same warm-start its AUC inside held-out groups is at most 0.6 in both towers.

    Its scores hardly differ, so nothing is asked of their correlation with length.
    """
    figures = gloo.run(warm_up_blind, tmp_path / "text", 2 * PROMPTS)[0]
    assert max(aucs(figures)) <= 0.6
    assert min(figures[f"{name}/auc_pairs"] or 0 for name in TOWER_NAMES) >= 300


def aucs(figures: Figures) -> list[float]:
    """Of perception and of reasoning."""
    return [float(figures[f"{name}/auc"] or 0.0) for name in TOWER_NAMES]


def lengths(figures: Figures) -> float:
    """The larger correlation of score and length, either way."""
    return max(abs(float(figures[f"{name}/{OVER_ALL}"] or 0.0)) for name in TOWER_NAMES)


@pytest.mark.long
def test_scenes_are_selected_and_asked_again(tmp_path: Path) -> None:
    """Claim: pass rates of scenes choose those that verifiable rewards then train on; another world's are refused."""
    selected = tmp_path / "out" / "selected.jsonl"
    sizes = ("--prompts-per-step", "4", "--rollouts-per-prompt", "4")
    asked = run("select_prompts.py", "--scenes", "12", "--keep-to", "0.9", "--output", str(selected.parent), *sizes)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    kept = [json.loads(line)["id"] for line in selected.read_text(encoding="utf-8").splitlines()]
    summary = json.loads((selected.parent / "summary.json").read_text(encoding="utf-8"))
    assert 0 < len(kept) < summary["prompts"] == 12
    assert all(name.startswith("scene-drift-align-42-") for name in kept)
    flags = ("--prompts", str(selected), "--steps", "2", "--eval-prompts", "0", "--seed", "7", *sizes)
    trained = run("run_rlvr.py", *flags, "--output", str(tmp_path / "run"))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    shown = json.loads((tmp_path / "run" / "samples.json").read_text(encoding="utf-8"))
    assert shown
    other = run("run_rlvr.py", *flags, "--output", str(tmp_path / "other"), mini="habits")
    assert other.returncode == 2
    assert f"{selected}:1: field id: '{kept[0]}' is no scene of the split 'align' of --mini habits" in other.stderr


def run(tool: str, *flags: str, mini: str = "drift") -> subprocess.CompletedProcess[str]:
    """On one rank."""
    command = [sys.executable, str(ROOT / "tools" / tool), "--mini", mini, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
