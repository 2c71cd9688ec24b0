"""What a discriminator is made of, with an engine that keeps what it is given (blind spot: its weights)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER, mini_folder
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.game import discriminator
from prism_megatron.game.discriminator import DiscriminatorOrigin
from prism_megatron.training import roles
from prism_megatron.training.roles import model_files

POLICY = MINI_FOLDER / "policy"


class Kept:
    """Keeps its arguments and the source of its weights."""

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.source: Any = None

    def load_hf(self, source: Any) -> None:
        self.source = source


def built(monkeypatch: pytest.MonkeyPatch, flags: DiscriminatorConfig, *, of_the_mini: bool) -> Any:
    monkeypatch.setattr(discriminator, "MegatronEngine", Kept)
    loaded: list[Any] = []
    monkeypatch.setattr(discriminator, "load_weights", lambda engine, folder: loaded.append((engine, folder)))
    world: Any = None
    engine: Any = DiscriminatorOrigin.of(flags, of_the_mini=of_the_mini).build(
        POLICY,
        Qwen3VLShape.from_folder(POLICY),
        world=world,
        dtype=torch.float32,
        optimizer=OptimizerConfig(lr=0.25),
        total_steps=9,
        seed=11,
    )
    return engine, [folder for _, folder in loaded]


def test_an_upcycled_one_is_drawn_as_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: noise of the experts and of the router, seed, towers and dropout each arrive; none is a default."""
    flags = DiscriminatorConfig(upcycle_noise=0.5, router_std=0.125, head_dropout=0.3, experts_per_tower=3, top_k=1)
    engine, loaded = built(monkeypatch, flags, of_the_mini=True)
    assert loaded == []
    source, provider = engine.source, engine.given["provider"]
    assert (source._expert_std, source._init_std, source._seed) == (0.5, 0.125, 11)
    assert (provider.head_dropout, provider.towers.experts_per_tower, provider.towers.top_k) == (0.3, 3, 1)
    assert (engine.given["optimizer"].lr, engine.given["total_steps"]) == (0.25, 9)


def test_the_minis_own_is_loaded_where_its_policy_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: of its kind only; elsewhere, and of another kind, one is upcycled."""
    engine, loaded = built(monkeypatch, DiscriminatorConfig(), of_the_mini=True)
    assert (engine.source, loaded) == (None, [MINI_FOLDER / "discriminator"])
    for flags, of_the_mini in ((DiscriminatorConfig(), False), (DiscriminatorConfig(routing="learned"), True)):
        engine, loaded = built(monkeypatch, flags, of_the_mini=of_the_mini)
        assert engine.source is not None
        assert loaded == []


def test_a_fresh_one_of_the_second_world_is_made_of_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: base weights and files, not the policy's; a shipped one that fits is loaded, and records have neither."""
    read: list[Path] = []

    def hf_tensors(folder: Path, of_shape: Qwen3VLShape) -> Any:
        read.append(folder)
        return roles.hf_tensors(folder, of_shape)

    monkeypatch.setattr(discriminator, "hf_tensors", hf_tensors)
    monkeypatch.setattr(discriminator, "MegatronEngine", Kept)
    world: Any = None
    shape, shipped = Qwen3VLShape.from_folder(POLICY), mini_folder("drift")
    dense = partial(DiscriminatorOrigin.of, DiscriminatorConfig(routing="dense"), of_the_mini=False, mini="drift")
    made = {scenes: dense(scenes=scenes) for scenes in (True, False)}
    for origin in made.values():
        origin.check(POLICY)
        origin.build(
            POLICY, shape, world=world, dtype=torch.float32, optimizer=OptimizerConfig(), total_steps=1, seed=0
        )
    assert read == [shipped / "base", POLICY]
    policy = model_files(POLICY, "policy", dtype=torch.float32)
    assert json.loads(made[True].files(policy, torch.float32).files["config.json"])["prism_discriminator"]
    own = DiscriminatorOrigin.of(DiscriminatorConfig(), of_the_mini=True, mini="drift")
    assert own.folder == shipped / "discriminator"
