"""The minis' shipped weights, and a shortened rebuild by the same command.

Blind spot: the full recipes' figures; those of what ships stand in ``test_drift_world.py`` for the second world.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.experiments.mini_world import mini_folder

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_mini.py"
SHORT = (
    *("--pretrain.steps", "3", "--pretrain.rows-per-step", "4"),
    *("--sft.steps", "2", "--sft.rows-per-step", "4"),
    *("--warm-start.steps", "2", "--warm-start.prompts-per-step", "2"),
    *("--min-auc", "0", "--seed", "5", "--measured-scenes", "4"),
)
MAX_SHIPPED_BYTES = 12_000_000


@pytest.mark.parametrize("mini", ["habits", "drift"])
def test_shipped_weights_are_small_and_those_that_were_made(mini: MiniWorld) -> None:
    """At most 12 MB a world, with the hashes that the recorded command wrote."""
    folder = mini_folder(mini)
    recorded = json.loads((folder / "provenance.json").read_text())["sha256"]
    shipped = {str(path.relative_to(folder)): path for path in folder.glob("*/*.safetensors")}
    assert set(recorded) == set(shipped)
    for name, path in shipped.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == recorded[name], name
    files = [path for name in shipped for path in (folder / name).parent.iterdir()]
    assert sum(path.stat().st_size for path in files) <= MAX_SHIPPED_BYTES


def make(folder: Path, *flags: str) -> str:
    """What the command says."""
    result = subprocess.run(
        [sys.executable, str(TOOL), *SHORT, *flags, "--output", str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The shortened recipe, twice."""
    folders = [tmp_path_factory.mktemp("mini") / name for name in ("first", "second")]
    for folder in folders:
        make(folder)
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


@pytest.mark.long
def test_the_second_world_begins_with_the_first_ones_policy_and_goes_on_by_phase(tmp_path: Path) -> None:
    """Claim: vision stays that policy's throughout, and the discriminator's experts begin as the base's.

    A phase whose folder is there is not run again; one that is missing is made again, to the same bytes.
    """
    said = make(tmp_path, "--world", "drift")
    first = load_file(mini_folder("habits") / "policy" / "model.safetensors")
    base, policy, judge = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "policy", "discriminator")
    )
    for name, tensor in first.items():
        frozen = ".visual." in name
        assert torch.equal(tensor, base[name]) == torch.equal(base[name], policy[name]) == frozen or tensor.dim() == 1
        assert not frozen or torch.equal(tensor, judge[name])
    # Two steps of 7e-4 move no weight further than 2e-3; the policy's first steps were at up to 1e-3.
    attention = "model.language_model.layers.0.self_attn.q_proj.weight"
    away = [(judge[attention].float() - source[attention].float()).abs().mean() for source in (base, policy)]
    assert away[0] < away[1]
    figures = json.loads((tmp_path / "provenance.json").read_text())["held out"]
    assert figures.keys() == {"base", "policy", "discriminator"}
    assert "base, greedy, 4 held-out scenes" in said

    kept, made = (tmp_path / "base" / "model.safetensors").stat(), (tmp_path / "policy" / "model.safetensors")
    before = made.read_bytes()
    shutil.rmtree(made.parent)
    again = make(tmp_path, "--world", "drift")
    assert "pretrain step" not in again and "warm-start step" not in again and "sft step" in again
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == kept.st_mtime_ns
    assert made.read_bytes() == before
