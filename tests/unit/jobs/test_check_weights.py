"""``convert.py check`` and ``inspect``: what they say of equal and of different folders, of either kind."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_megatron.commands import convert
from prism_megatron.config.check import CheckConfig, InspectConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import TargetLayout, ToMegatronConfig
from prism_megatron.conversion import compare
from prism_megatron.conversion.hf.reader import SINGLE
from prism_megatron.errors import ConfigError
from prism_megatron.jobs.check_weights import Check, check_weights
from prism_megatron.jobs.convert import to_megatron
from prism_megatron.jobs.inspect_folder import inspect_folder, text
from prism_megatron.parity.tiny import MODELS, tiny_config, tiny_model
from tests.unit.conversion.folders import checkpoint_of

NORM = "model.language_model.norm.weight"
GATE_UP = "model.language_model.layers.1.mlp.experts.gate_up_proj"


def converted(source: Path, target: Path, layout: TargetLayout | None = None) -> Path:
    flags = ToMegatronConfig(layout or TargetLayout(), hf=str(source), save=str(target), weights_only=True)
    to_megatron(flags, say=lambda _: None)
    return target


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with fused experts and a vocabulary that is padded."""
    folder = tmp_path_factory.mktemp("experts")
    tiny_model(tiny_config(**MODELS["MoE"])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(experts, tmp_path_factory.mktemp("checkpoint") / "tp2", TargetLayout(tp=2, pp=2, ep=2))


def changed(source: Path, target: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A copy of a model folder with some tensors replaced or added."""
    shutil.copytree(source, target)
    save_file(load_file(target / SINGLE) | {name: t.clone() for name, t in tensors.items()}, target / SINGLE)
    return target


@pytest.mark.parametrize("chunk_bytes", [2**26, 30_000], ids=["whole", "in many parts"])
def test_equal_folders_of_every_kind(
    experts: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """Claim: model folder and checkpoint, both ways, and two checkpoints of other layouts; one hash for a tensor.

    Oracle of the hashes: hashlib over safetensors' bytes.
    """
    monkeypatch.setattr(compare, "CHUNK_BYTES", chunk_bytes)
    other = converted(experts, tmp_path / "tp1")
    there, back = (
        check_weights(CheckConfig(str(checkpoint), str(experts))),
        check_weights(CheckConfig(str(experts), str(checkpoint))),
    )
    assert there.equal and back.equal and there.hash_of_all() == back.hash_of_all()
    assert check_weights(CheckConfig(str(checkpoint), str(other))).equal
    held = load_file(experts / SINGLE)
    assert {one.name for one in there.compared} == set(held)
    for one in there.compared:
        header = f"float32 {list(held[one.name].shape)}"
        content = header.encode() + held[one.name].numpy().tobytes()
        assert one.hash_a == hashlib.blake2b(content, digest_size=32).hexdigest()
    assert there.text().splitlines()[-1].startswith(f"equal: {len(held)} tensors")


def test_differences_are_named_and_measured(experts: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Claim: values, a single number, a sign of zero, a NaN, a format, a shape and a missing name are told apart."""
    held = load_file(experts / SINGLE)
    norm, gate = held[NORM].clone(), held[GATE_UP].clone()
    norm[3] += 0.5
    gate[2, 1, 0] = float("nan")
    one = changed(experts, tmp_path / "values", {NORM: norm, GATE_UP: gate})
    found = check_weights(CheckConfig(str(checkpoint), str(one)))
    different = {d.name: d for d in found.compared if not d.equal}
    assert set(different) == {NORM, GATE_UP}
    assert different[NORM].num_different == 1
    assert different[NORM].max_difference == pytest.approx(0.5, rel=1e-6)
    assert str(different[GATE_UP]).endswith("1 elements differ, by at most nan")
    assert "different: 2 of" in found.text()
    zero, minus = torch.zeros(4), torch.zeros(4)
    minus[1] = -0.0
    scales = {"none": torch.zeros(0, 4), "scale": torch.tensor(0.5)}
    a = changed(experts, tmp_path / "a", {**scales, **dict.fromkeys(("zero", "format", "shape", "extra"), zero)})
    other = {**scales, "scale": torch.tensor(float("inf"))}
    b = changed(experts, tmp_path / "b", {**other, "zero": minus, "format": zero.bfloat16(), "shape": zero.view(2, 2)})
    found = check_weights(CheckConfig(str(a), str(b)))
    assert [str(d) for d in found.compared if not d.equal] == [
        "format: float32 [4], but bfloat16 [4]",
        "scale float32 []: 1 elements differ, by at most inf",
        "shape: float32 [4], but float32 [2, 2]",
        "zero float32 [4]: 1 elements differ, by at most 0",
    ]
    assert (found.only_in_a, found.only_in_b) == (["extra"], [])
    document = json.loads(found.as_json(), parse_constant=pytest.fail)
    assert document["equal"] is False
    assert [t["max_difference"] for t in document["tensors"] if t["name"] == "scale"] == ["inf"]
    with pytest.raises(ConfigError, match="--role policy picks what of a checkpoint"):
        check_weights(CheckConfig(str(a), str(b), role="policy"))


def test_two_checkpoints_are_compared_with_each_other(tmp_path: Path) -> None:
    """Claim: names that one of them lacks make a difference on either side; only what both have is counted. Where one
    has no optimizer, weights alone are compared, and that is said."""
    weights = {"policy.a": torch.arange(3.0), "policy.b": torch.zeros(5)}
    state = {"optimizer.exp_avg.policy.a": torch.ones(3)}

    def check(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> Check:
        engines = {"policy": {"steps_taken": 1, "adam_step": 1}}
        for name, tensors in (("a", a), ("b", b)):
            checkpoint_of(tmp_path / name, tensors, engines)
        return check_weights(CheckConfig(str(tmp_path / "a"), str(tmp_path / "b")))

    assert check(weights | state, weights | state).equal
    trained = check(weights | state, weights)
    assert trained.equal
    assert trained.notes == ["one of the checkpoints has no optimizer state: only weights are compared"]
    assert trained.num_bytes == 32
    changed_state = {name: tensor + 1 for name, tensor in state.items()}
    assert [one.name for one in check(weights | state, weights | changed_state).compared if not one.equal] == [*state]
    assert check(weights | state, weights | changed_state).notes == []
    more = weights | {"policy.c": torch.zeros(7)}
    for a, b, only_in_a, only_in_b in ((more, weights, ["policy.c"], []), (weights, more, [], ["policy.c"])):
        found = check(a, b)
        assert (found.only_in_a, found.only_in_b, found.num_bytes, found.equal) == (only_in_a, only_in_b, 32, False)


def test_the_first_ten_differences_are_shown(tmp_path: Path) -> None:
    """Claim: more are counted, and ten are all."""
    for count, rest in ((10, []), (11, ["  … and 1 more"]), (13, ["  … and 3 more"])):
        for name, value in (("a", 0.0), ("b", 1.0)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_file({f"{n:02d}": torch.tensor(value) for n in range(count)}, tmp_path / name / SINGLE)
        lines = check_weights(CheckConfig(str(tmp_path / "a"), str(tmp_path / "b"))).text().splitlines()
        assert lines[0] == f"{count} tensors differ:"
        assert lines[1:11] == [f"  {n:02d} float32 []: 1 elements differ, by at most 1" for n in range(10)]
        assert lines[11:-1] == rest


def test_inspect_says_what_a_folder_holds(experts: Path, checkpoint: Path) -> None:
    """Claim: counts and bytes are safetensors'; role, layouts, vocabulary with its padding and chunks are named."""
    held = load_file(experts / SINGLE)
    of_folder = inspect_folder(InspectConfig(str(experts)))
    of_checkpoint = inspect_folder(InspectConfig(str(checkpoint), tensors=True))
    parameters = sum(tensor.numel() for tensor in held.values())
    hidden = held[NORM].numel()
    padding = 2 * (384 - 301) * hidden
    assert of_folder["weights"]["parameters"] == parameters
    assert of_folder["weights"]["bytes"] == 4 * parameters
    assert of_folder["experts are stored as"] == "transformers"
    assert "preprocessor_config.json does not exist" in of_folder["files beside the weights"]
    policy = of_checkpoint["policy"]
    assert policy["weights"]["parameters"] == parameters + padding
    assert policy["vocabulary"] == "301 words in 384 rows (83 of padding)"
    assert policy["experts are stored in Hugging Face folders as"] == "transformers"
    assert of_checkpoint["tensors"]["policy.output_layer.weight"].startswith(f"float32 [384, {hidden}] in ")
    assert "301 words in 384 rows" in text(of_checkpoint)
    assert "optimizer" not in policy


def test_the_tool_ends_with_a_status_for_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: status 1 and a summary line where folders differ; JSON on request. Blind spot: no process is started."""
    main = convert.main

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
        return main(), capsys.readouterr().out

    policy, discriminator = str(MINI_FOLDER / "policy"), str(MINI_FOLDER / "discriminator")
    status, said = run("check", policy, discriminator)
    assert status == 1
    assert said.splitlines()[-1].startswith("different: ")
    status, said = run("inspect", discriminator, "--json")
    assert status == 0
    assert json.loads(said)["kind"] == "discriminator folder"


def test_no_folder_is_one_line() -> None:
    with pytest.raises(ConfigError, match="check compares two models; name both"):
        check_weights(CheckConfig())
    with pytest.raises(ConfigError, match="check no/such/folder is not a folder; give a run folder"):
        check_weights(CheckConfig("no/such/folder", "no/such/folder"))
    with pytest.raises(ConfigError, match="inspect needs a model: a run folder"):
        inspect_folder(InspectConfig())
