"""What starts a conversion over, whose weights are taken, and what may be replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig
from prism_megatron.errors import ConfigError, ConversionError
from prism_megatron.jobs import convert
from prism_megatron.jobs.convert import role_of, to_hf, to_megatron


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "mini"
    to_megatron(ToMegatronConfig(hf=str(MINI_FOLDER / "policy"), save=str(folder)), say=lambda _: None)
    return folder


def touch_config(folder: Path) -> None:
    path = folder / "hf" / "policy" / "config.json"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("flags", "change", "goes_on"),
    [
        ({}, nothing, True),
        ({"workers": 3}, nothing, True),
        ({"overwrite": True}, nothing, True),
        ({"dtype": "fp32"}, nothing, False),
        ({"shard_mb": 1}, nothing, False),
        ({}, touch_config, False),
        ({}, lambda folder: (folder / "new").touch(), False),
    ],
    ids=["the same", "workers", "overwrite", "dtype", "shards", "another config", "another file"],
)
def test_what_decides_the_bytes_starts_over(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    flags: dict[str, Any],
    change: Callable[[Path], None],
    goes_on: bool,
) -> None:
    """Claim: an interrupted conversion goes on under the same source and flags; those that change no byte are free."""
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    config = ToHFConfig(load=str(source), save=str(tmp_path / "hf"))
    with monkeypatch.context() as patched:
        patched.setattr(convert, "_copy_companions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            to_hf(config, say=lambda _: None)
    change(source)
    said: list[str] = []
    to_hf(replace(config, **flags), say=said.append)
    assert ("going on where" in said[0]) == goes_on
    assert ("starting over" in said[0]) != goes_on


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_role_is_taken_or_asked_for() -> None:
    """Claim: the policy of two, the only one of one, or the one that is named; never one that is not there."""

    def role(asked: Any, *models: str) -> str:
        folder: Any = SimpleNamespace(folder=Path("x"), document={"models": dict.fromkeys(models)})
        return role_of(folder, asked)

    assert role(None, "discriminator", "policy") == "policy"
    assert role(None, "discriminator") == "discriminator"
    assert role("discriminator", "policy", "discriminator") == "discriminator"
    with pytest.raises(ConfigError, match="--role discriminator: x holds policy"):
        role("discriminator", "policy")
    with pytest.raises(ConversionError, match="x holds no model; name one with --role"):
        role(None)


def test_only_a_finished_folder_of_the_kind_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    """Claim: --overwrite gives neither direction a right to other folders."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    policy, mine = str(MINI_FOLDER / "policy"), str(tmp_path / "mine")
    with pytest.raises(ConversionError, match="exists and is no checkpoint"):
        to_megatron(ToMegatronConfig(hf=policy, save=mine, overwrite=True), say=lambda _: None)
    with pytest.raises(ConversionError, match="exists and is no model folder"):
        to_hf(ToHFConfig(load=str(checkpoint), save=mine, overwrite=True), say=lambda _: None)
    assert (tmp_path / "mine" / "thesis.tex").exists()
