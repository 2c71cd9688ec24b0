"""Every tool takes a run folder, a checkpoint, a model folder or a hub id where a model is asked for."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import threading
from pathlib import Path
from typing import Literal

import pytest
import torch

from prism_megatron.commands import align, verify, warm_start
from prism_megatron.config.check import CheckConfig, InspectConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.config.tools.verify import VerifyConfig
from prism_megatron.conversion.checkpoints.folder import CHECKPOINTS, read_state, step_folder
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.engine import checkpoint
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError
from prism_megatron.game.discriminator import DiscriminatorOrigin
from prism_megatron.jobs.check_weights import check_weights
from prism_megatron.jobs.convert import to_hf, to_megatron
from prism_megatron.jobs.inspect_folder import inspect_folder
from prism_megatron.jobs.serve import default_context, serve
from prism_megatron.testing import GlooWorld
from prism_megatron.training.roles import model_files
from tests import hub_cache
from tests.mini_players import mini_discriminator, mini_policy
from tests.unit.rollout.stub_sglang import stub_python

POLICY, DISCRIMINATOR = MINI_FOLDER / "policy", MINI_FOLDER / "discriminator"
Way = Literal["run folder", "checkpoint", "model folder", "hub id"]
WAYS: tuple[Way, ...] = ("run folder", "checkpoint", "model folder", "hub id")


def silent(_text: str) -> None:
    return


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini's two models, each in all forms."""
    root = tmp_path_factory.mktemp("names")
    for role, folder in (("policy", POLICY), ("discriminator", DISCRIMINATOR)):
        to_megatron(ToMegatronConfig(hf=str(folder), save=str(root / role / "checkpoint")), say=silent)
        run = root / role / "run"
        shutil.copytree(root / role / "checkpoint", step_folder(run / CHECKPOINTS, 2))
        step_folder(run / CHECKPOINTS, 4).mkdir()  # a save that was cut off
        (run / "config.yaml").write_text("steps: 4\n")
        hub_cache.put(root / "cache", f"org/{role}", folder)
    return root


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, folders: Path, monkeypatch: pytest.MonkeyPatch) -> Way:
    hub_cache.use(folders / "cache", monkeypatch)
    way: Way = request.param
    return way


def name_of(way: Way, role: str, folders: Path) -> str:
    return {
        "run folder": str(folders / role / "run"),
        "checkpoint": str(folders / role / "checkpoint"),
        "model folder": str(MINI_FOLDER / role),
        "hub id": f"org/{role}@main",
    }[way]


def test_stages_take_all(way: Way, folders: Path) -> None:
    """Claim: both players of both stages, at the door and where they are built; the configuration keeps the name."""
    policy, discriminator = name_of(way, "policy", folders), name_of(way, "discriminator", folders)
    for stage in (align, warm_start):
        config = stage.parse(["--model", policy, "--discriminator", discriminator, "--steps", "1"])
        stage.check(config)
        assert (config.model.model, config.discriminator.discriminator) == (policy, discriminator)
        origin = DiscriminatorOrigin.of(config.discriminator, of_the_mini=False)
        origin.check(POLICY)


def test_convert_takes_all(way: Way, folders: Path, tmp_path: Path) -> None:
    """Claim: in both directions and bit for bit; ``check`` holds any two forms against one another."""
    for role in ("policy", "discriminator"):
        name, plain = name_of(way, role, folders), name_of("model folder", role, folders)
        save, back = tmp_path / role, tmp_path / f"{role}-back"
        to_megatron(ToMegatronConfig(hf=name, save=str(save)), say=silent)
        to_hf(ToHFConfig(load=name, save=str(back)), say=silent)
        for a, b in ((name, plain), (str(save), name), (str(back), plain), (str(save), plain)):
            assert check_weights(CheckConfig(a, b)).equal
        assert sorted(path.name for path in back.iterdir()) == sorted(path.name for path in Path(plain).iterdir())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_inspect_and_verify_take_all(way: Way, folders: Path) -> None:
    """Claim: ``verify`` reads a model folder, whatever was named, and leaves nothing behind."""
    for role in ("policy", "discriminator"):
        name = name_of(way, role, folders)
        facts = inspect_folder(InspectConfig(name))
        held = facts if "weights" in facts else facts[role]
        assert held["weights"]["tensors"] > 0
        with verify.readable(VerifyConfig(hf=name)) as config:
            checked = verify.checked(config)
            assert checked.hf is not None
            assert HFFolder(checked.hf).names() == HFFolder(MINI_FOLDER / role).names()
        assert Path(checked.hf).exists() == (way in ("model folder", "hub id"))


def test_serve_takes_all(way: Way, folders: Path, tmp_path: Path) -> None:
    """Claim: under the name's last part, with a context that the model allows. A stub stands in for SGLang."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    stop = threading.Event()
    served = {}

    def say(text: str) -> None:
        if text.startswith("serving"):
            served.update(json.loads((tmp_path / "logs" / "server-0.yaml").read_text()))
            served["weights"] = HFFolder(served["model-path"]).names()
            stop.set()

    config = ServeConfig(
        load=name_of(way, "policy", folders), port=port, sglang_python=stub_python(tmp_path), logs=tmp_path / "logs"
    )
    serve(config, say=say, stop=stop)
    last = {"run folder": "run", "checkpoint": "checkpoint", "model folder": "policy", "hub id": "policy"}[way]
    assert served["served-model-name"] == last
    assert served["weights"] == HFFolder(POLICY).names()
    assert served["context-length"] == 4096
    with pytest.raises(ConfigError, match="discriminator"):
        serve(dataclasses.replace(config, load=name_of(way, "discriminator", folders)), say=say, stop=stop)


@pytest.mark.parametrize(("allowed", "context"), [(262144, 8192), (4096, 4096), (None, 8192)])
def test_a_server_has_room_for_what_training_allows(allowed: int | None, context: int, tmp_path: Path) -> None:
    """Claim: 2048 tokens of prompt and 6144 of response, unless the model ends sooner."""
    text = {} if allowed is None else {"max_position_embeddings": allowed}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert default_context(tmp_path) == context


def test_what_is_upcycled_may_be_a_checkpoint(folders: Path, tmp_path: Path) -> None:
    made, direct = tmp_path / "made", tmp_path / "direct"
    for source, save in ((folders / "policy" / "checkpoint", made), (POLICY, direct)):
        to_megatron(ToMegatronConfig(hf=str(source), save=str(save), as_role="discriminator"), say=silent)
    assert check_weights(CheckConfig(str(made), str(direct))).equal
    with pytest.raises(ConfigError, match="is a discriminator already"):
        to_megatron(ToMegatronConfig(hf=str(DISCRIMINATOR), save="x", as_role="discriminator"), say=silent)


def save_both(world: World, folder: Path) -> None:
    players = {"policy": mini_policy(world), "discriminator": mini_discriminator(world)}
    files = {role: model_files(MINI_FOLDER / role, role, dtype=torch.float32) for role in players}
    checkpoint.save(folder, players, {}, models=files)


@pytest.mark.long
def test_a_checkpoint_of_both_gives_the_role_that_is_asked_for(tmp_path: Path) -> None:
    """Claim: ``--as`` picks a role that it has, by default the policy, with its weights: nothing is upcycled then."""
    both = tmp_path / "both"
    with GlooWorld(1) as gloo:
        gloo.run(save_both, both)
    for asked, held in ((None, POLICY), ("policy", POLICY), ("discriminator", DISCRIMINATOR)):
        save, back = tmp_path / f"{asked}", tmp_path / f"{asked}-back"
        to_megatron(ToMegatronConfig(hf=str(both), save=str(save), as_role=asked), say=silent)  # type: ignore[arg-type]
        assert read_state(save)["models"].keys() == {held.name}
        to_hf(ToHFConfig(load=str(save), save=str(back), dtype="bf16"), say=silent)
        assert check_weights(CheckConfig(str(back), str(held))).equal


def test_a_role_that_a_model_folder_does_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a policy"):
        to_hf(ToHFConfig(load=str(POLICY), save=str(tmp_path / "x"), role="discriminator"), say=silent)


@pytest.mark.parametrize("flag", ["--model", "--discriminator"])
def test_a_name_of_nothing_is_refused_with_its_flag(flag: str) -> None:
    """Before any process starts, in both stages."""
    for stage in (align, warm_start):
        assert stage.main([flag, "no/such/folder"]) == 2
        with pytest.raises(ConfigError, match=f"{flag} no/such/folder is not a folder"):
            stage.check(stage.parse([flag, "no/such/folder"]))


def test_ranks_cannot_each_write_a_checkpoint_for_verify(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match="start this without torchrun"),
        verify.readable(VerifyConfig(hf=str(folders / "policy" / "run"))),
    ):
        raise AssertionError("it was written")
