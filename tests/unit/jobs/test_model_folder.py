"""One door: whatever is wrong with a model folder, every tool that is given it says so, in the same words."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands import align, verify
from prism_megatron.config.check import InspectConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.config.tools.verify import VerifyConfig
from prism_megatron.errors import PrismError
from prism_megatron.jobs.convert import to_hf, to_megatron
from prism_megatron.jobs.inspect_folder import inspect_folder
from prism_megatron.jobs.model_folder import open_model_folder
from prism_megatron.jobs.serve import serve
from tests.unit.rollout.stub_sglang import stub_python

POLICY, DISCRIMINATOR = MINI_FOLDER / "policy", MINI_FOLDER / "discriminator"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(POLICY, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def refusals(folder: Path, tmp_path: Path) -> dict[str, str]:
    """What each tool says of a folder, by the tool; empty where it takes it."""
    config = ServeConfig(load=str(folder), sglang_python=stub_python(tmp_path), logs=tmp_path / "logs", port=1)
    stop = threading.Event()
    stop.set()
    tools: dict[str, Callable[[], Any]] = {
        "convert": lambda: to_megatron(ToMegatronConfig(hf=str(folder), save=str(tmp_path / "m")), say=lambda _: None),
        "verify": lambda: verify.checked(VerifyConfig(hf=str(folder))),
        "serve": lambda: serve(config, say=lambda _: None, stop=stop),
        "inspect": lambda: inspect_folder(InspectConfig(str(folder))),
        "align": lambda: align.check(align.parse(["--model", str(folder), "--steps", "1"])),
    }
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prism_megatron.jobs.serve._check_port", lambda _port: None)
        for name, tool in tools.items():
            said[name] = ""
            try:
                tool()
            except PrismError as error:
                said[name] = str(error)
    assert (tmp_path / "m").exists() == (said["convert"] == "")
    return said


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda found: found["text_config"]["rope_scaling"].update(rope_type="yarn"), "rope_type is 'yarn'"),
        (lambda found: found["text_config"].update(rope_scaling={"type": "linear"}), "type is 'linear'"),
        (lambda found: found["text_config"].update(is_causal=False), "is_causal is False"),
        (
            lambda found: found["vision_config"].update(num_attention_heads=2),
            "num_heads is 4 but num_attention_heads is 2",
        ),
    ],
)
def test_a_config_of_another_model_is_refused_alike(
    edit: Callable[[dict[str, Any]], Any], message: str, folder: Path, tmp_path: Path
) -> None:
    change(folder, edit)
    said = refusals(folder, tmp_path)
    assert len(set(said.values())) == 1, said
    assert message in said["verify"] and str(folder) in said["verify"]


def test_weights_that_are_not_the_configs_are_refused_alike(folder: Path, tmp_path: Path) -> None:
    """Claim: a stale size is named with both shapes, before any weight is read. ``align`` meets it when it loads."""
    change(folder, lambda found: found["text_config"].update(vocab_size=520))
    said = refusals(folder, tmp_path)
    assert said.pop("align") == ""
    assert len(set(said.values())) == 1, said
    assert said["verify"] == (
        f"{folder}: 'model.language_model.embed_tokens.weight' has shape (512, 128), but the model's config makes it "
        "(520, 128)"
    )


def test_what_transformers_does_not_read_is_refused_alike(folder: Path, tmp_path: Path) -> None:
    """Claim: also where our model has no use for the key; ``align`` meets it where it builds what samples."""
    change(folder, lambda found: found["text_config"].update(initializer_range="0.02"))
    said = refusals(folder, tmp_path)
    assert said.pop("align") == ""
    assert len(set(said.values())) == 1, said
    assert said["verify"].startswith(f"transformers cannot read {folder}: ")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "preprocessor_config.json"])
def test_a_folder_that_cannot_train_is_refused_with_the_file(name: str, folder: Path, tmp_path: Path) -> None:
    """Claim: by all that make or take inputs; ``inspect`` says it. Weights alone are converted where that is asked for,
    and a model folder is written in another form whatever lies beside it."""
    (folder / name).unlink()
    said = refusals(folder, tmp_path)
    assert said.pop("inspect") == ""
    assert len(set(said.values())) == 1, said
    assert f"{folder / name} does not exist" in said["convert"]
    assert said["convert"] in inspect_folder(InspectConfig(str(folder)))["files beside the weights"]
    flags = ToMegatronConfig(hf=str(folder), save=str(tmp_path / "weights"), weights_only=True)
    to_megatron(flags, say=lambda _: None)
    to_hf(ToHFConfig(load=str(folder), save=str(tmp_path / "again")), say=lambda _: None)
    assert not (tmp_path / "again" / name).exists()


def test_whole_folders_of_both_roles_are_taken(folder: Path, tmp_path: Path) -> None:
    assert set(refusals(folder, tmp_path).values()) == {""}
    assert open_model_folder(POLICY).variant is None
    assert open_model_folder(DISCRIMINATOR).variant is not None
