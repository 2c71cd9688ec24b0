"""``tools/verify.py``: what it says of the mini policy, of a perturbed weight, and of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.discriminator import Modality, Routing
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig, UpcyclingConfig
from prism_megatron.config.tools.verify import VerifyConfig
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.engine.runtime import World
from prism_megatron.jobs.convert import to_hf, to_megatron
from prism_megatron.parity import ranks
from prism_megatron.parity.by_layer import compare_by_layer
from prism_megatron.parity.compare import FP32, Difference
from prism_megatron.parity.prompts import prompted_samples
from prism_megatron.parity.report import Report
from prism_megatron.parity.samples import sample_sets
from prism_megatron.parity.tiny import MODELS, tiny_config, tiny_model
from prism_megatron.parity.verify import verify
from prism_megatron.testing import GlooWorld
from tests.conftest import REPOSITORY

POLICY = MINI_FOLDER / "policy"
PERTURBED = "model.language_model.layers.2.self_attn.k_norm.weight"


class PerturbedFolder(HFFolder):
    """One value of one weight is off by 1 %."""

    def get(self, name: str) -> Tensor:
        tensor = super().get(name)
        if name == PERTURBED:
            tensor = tensor.clone()
            tensor[0] *= 1.01
        return tensor


def run_tool(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/verify.py", *flags], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("flags", [(), ("--tp", "2", "--pp", "2", "--cp", "2", "--pack"), ("--by-layer",)])
def test_the_mini_policy_is_the_same_model(flags: tuple[str, ...]) -> None:
    """Claim: from plain python, whatever the layout, status 0 and a last line of JSON with the promised fields."""
    done = run_tool("--hf", str(POLICY), "--json", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ok"] is True
    assert result["logits_max_abs"] <= result["tolerance"]["logits"] == FP32.logits
    assert result["grad_max_rel"] <= result["tolerance"]["gradients"] == FP32.gradients
    assert result["token_agreement"] == 1.0
    assert result["worst_parameter"]
    assert result["peak_bytes"] > 2**20
    assert result["layout"]["tp"] == (2 if "--tp" in flags else 1)


def verify_perturbed(world: World, config: VerifyConfig) -> Report | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "open_weights", PerturbedFolder)
        return verify(world, config)


def compare_perturbed(world: World) -> Difference:
    shape = Qwen3VLShape.from_folder(POLICY)
    samples = prompted_samples(POLICY, (), 3)
    return compare_by_layer(world, POLICY, shape, samples, recompute=RecomputeConfig(), source=PerturbedFolder(POLICY))


def test_a_perturbed_weight_is_seen() -> None:
    """Claim: 1 % off in one of 16 values of one norm fails both ways; layer by layer names that layer."""
    with GlooWorld(1) as gloo:
        (report,) = gloo.run(verify_perturbed, VerifyConfig(hf=str(POLICY)))
        (by_layer,) = gloo.run(compare_perturbed)
    assert not report.ok
    assert not by_layer.within(FP32)
    assert {name for name, error in by_layer.gradients if error > FP32.gradients} <= {
        name for name, _ in by_layer.gradients if "layers.2." in name or "layer 2," in name
    }


def compare_experts(world: World, folder: Path) -> Difference:
    shape = Qwen3VLShape.from_folder(folder)
    return compare_by_layer(world, folder, shape, sample_sets()["three sizes"], recompute=RecomputeConfig())


def test_fused_experts_are_compared_by_layer(tmp_path: Path) -> None:
    """Claim: layer by layer, every tensor of a tiny model with experts is compared, and is right."""
    tiny_model(tiny_config(**MODELS["MoE"])).save_pretrained(tmp_path)
    with GlooWorld(1) as gloo:
        (found,) = gloo.run(compare_experts, tmp_path)
    assert found.within(FP32)
    assert set(HFFolder(tmp_path).names()) <= {name for name, _ in found.gradients}


def test_a_discriminator_folder_is_verified_too() -> None:
    """Claim: scores and every gradient of the mini's discriminator are plain torch's, in fp32 and bf16, cut and whole.

    A value 1 % off is seen. Blind spot: experts that none of the few built-in tokens choose have no gradient.
    """
    folder = str(MINI_FOLDER / "discriminator")
    cut = ParallelConfig(tp=2, ep=2)
    with GlooWorld(2) as gloo:
        report, _ = gloo.run(verify, VerifyConfig(cut, hf=folder), parallel=cut)
        (packed,) = gloo.run(verify, VerifyConfig(hf=folder, pack=True), num_ranks=1)
        (rounded,) = gloo.run(verify, VerifyConfig(hf=folder, dtype="bf16"), num_ranks=1)
        (perturbed,) = gloo.run(verify_perturbed, VerifyConfig(hf=folder), num_ranks=1)
    assert report.ok and packed.ok and rounded.ok and not perturbed.ok
    assert {name for name, _ in report.difference.gradients} == set(HFFolder(folder).names())
    assert json.loads(report.as_json())["scores_max_abs"] <= FP32.logits
    assert "scores " in report.text() and "next token" not in report.text()


@pytest.mark.parametrize(("routing", "modality"), [("learned", "multimodal"), ("dense", "text")])
def test_discriminators_of_other_kinds_are_verified(tmp_path: Path, routing: Routing, modality: Modality) -> None:
    """Claim: as above for a pool of experts and for dense MLPs, upcycled from the mini's policy by conversion.

    Images are shown to one of text too, whose vision tower training would freeze: all its weights are compared.
    """
    checkpoint, folder = str(tmp_path / "checkpoint"), str(tmp_path / "folder")
    upcycling = UpcyclingConfig(routing=routing, modality=modality)
    to_megatron(
        ToMegatronConfig(hf=str(POLICY), save=checkpoint, as_role="discriminator", upcycling=upcycling),
        say=lambda _line: None,
    )
    to_hf(ToHFConfig(load=checkpoint, save=folder), say=lambda _line: None)
    cut = ParallelConfig(tp=2, ep=2 if routing == "learned" else 1)
    with GlooWorld(2) as gloo:
        report, _ = gloo.run(verify, VerifyConfig(cut, hf=folder, pack=True), parallel=cut)
    assert report.ok
    assert {name for name, _ in report.difference.gradients} == set(HFFolder(folder).names())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "--hf"),
        (("--hf", "no/such/folder"), "no/such/folder is not a folder"),
        (("--hf", str(POLICY), "--tp", "3"), "--tp 3 does not divide"),
        (("--hf", str(POLICY), "--ep", "2"), "--ep"),
        (("--hf", str(POLICY), "--cp", "0"), "--cp 0 must be at least 1"),
        (("--hf", str(POLICY), "--vpp", "2"), "--vpp 2"),
        (("--hf", str(POLICY), "--image", "README.md"), "README.md: the image cannot be read"),
        (("--hf", str(POLICY), "--by-layer", "--dtype", "bf16"), "--dtype fp32"),
        (("--hf", str(MINI_FOLDER / "discriminator"), "--by-layer"), "leave --by-layer out"),
        (("--hf", str(MINI_FOLDER / "discriminator"), "--ep", "3"), "--ep 3 must divide the 4 experts of a tower"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags: tuple[str, ...], complaint: str) -> None:
    """Claim: refused before any weights are read or processes started, naming what to change."""
    done = run_tool(*flags)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert complaint in line
    assert not done.stdout


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    done = run_tool("--hf", str(tmp_path))
    assert done.returncode == 2
    assert "is not a Qwen3-VL" in done.stderr
