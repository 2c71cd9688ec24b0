"""The mini's shipped weights, and a shortened rebuild by the same command (blind spot: the full recipe's figures)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prism_megatron.config.experiments.mini_world import MINI_FOLDER

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_mini.py"
SHORT = (
    *("--pretrain.steps", "3", "--pretrain.rows-per-step", "4"),
    *("--sft.steps", "2", "--sft.rows-per-step", "4"),
    *("--warm-start.steps", "2", "--warm-start.prompts-per-step", "2"),
    *("--min-auc", "0", "--seed", "5"),
)
MAX_SHIPPED_BYTES = 12_000_000


def test_shipped_weights_are_small_and_those_that_were_made() -> None:
    """At most 12 MB, with the hashes that the recorded command wrote."""
    recorded = json.loads((MINI_FOLDER / "provenance.json").read_text())["sha256"]
    shipped = {str(path.relative_to(MINI_FOLDER)): path for path in MINI_FOLDER.glob("*/*.safetensors")}
    assert set(recorded) == set(shipped)
    for name, path in shipped.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == recorded[name], name
    assert sum(path.stat().st_size for path in MINI_FOLDER.rglob("*") if path.is_file()) <= MAX_SHIPPED_BYTES


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The shortened recipe, twice."""
    folders = [tmp_path_factory.mktemp("mini") / name for name in ("first", "second")]
    for folder in folders:
        result = subprocess.run(
            [sys.executable, str(TOOL), *SHORT, "--output", str(folder)],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    return folders


@pytest.mark.long
def test_the_same_seed_makes_the_same_bytes(rebuilt: list[Path]) -> None:
    """Base, policy and discriminator of two runs are equal, byte for byte."""
    for name in ("base", "policy", "discriminator"):
        first, second = ((folder / name / "model.safetensors").read_bytes() for folder in rebuilt)
        assert first == second, name


@pytest.mark.long
def test_each_phase_trains_what_it_should(rebuilt: list[Path]) -> None:
    """Pre-training moves everything; SFT leaves vision tower and projector alone; warm-start moves the experts."""
    init, base, policy, discriminator = (
        load_file(rebuilt[0] / name / "model.safetensors") for name in ("init", "base", "policy", "discriminator")
    )
    frozen = [name for name in base if ".visual." in name]
    assert frozen
    for name, tensor in base.items():
        moved = not torch.equal(tensor, init[name].to(torch.bfloat16))
        assert moved or tensor.dim() == 1, f"pre-training left {name} as it was"  # bf16 hides three steps
        kept = torch.equal(tensor, policy[name])
        assert kept == (name in frozen) or tensor.dim() == 1, name
    for name in frozen:
        assert torch.equal(policy[name], discriminator[name]), name
    dense = policy["model.language_model.layers.0.mlp.down_proj.weight"].float()
    experts = [tensor for name, tensor in discriminator.items() if "layers.0.mlp.experts" in name and "down" in name]
    assert len(experts) == 8
    assert all(0 < (expert.float() - dense).abs().mean() < 0.1 for expert in experts)
