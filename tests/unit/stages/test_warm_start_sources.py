"""What a warm-start trains on and holds out (blind spot: what is sampled for it)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from PIL import Image

from prism_megatron.config.stages.warm_start import (
    MINI_WARM_START,
    MINI_WARM_START_RECORDS,
    GateConfig,
    WarmStartConfig,
    mini_warm_start,
)
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.records import Record, in_part
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.stages.warm_start.build import build_sources
from prism_megatron.stages.warm_start.pairs import SampledPairs
from prism_megatron.types import Prompt, Response, Rollout, Segments, VersionSpan

BATCH = 4


def make_set(folder: Path, ids: list[str], *, solution: str | None) -> Path:
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "images" / "1.png")
    record = {"image": "images/1.png", "question": "q", "choices": None, "answer": "1", "answer_type": "integer"}
    record |= {"solution": solution, "caption": "c", "source": "made"}
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"id": name, **record}) for name in ids))
    return folder


def ids_of_train(count: int) -> list[str]:
    """Ids that are never held out."""

    def is_train(name: str) -> bool:
        return in_part(Record(name, Path("x"), "q", None, "1", None, "c", "made"), "train", validation_share=0.1)

    return [name for name in (f"r-{i}" for i in range(10 * count)) if is_train(name)][:count]


def config(folder: Path, gate: GateConfig) -> WarmStartConfig:
    return replace(
        MINI_WARM_START_RECORDS,
        data=replace(MINI_WARM_START_RECORDS.data, data=folder),
        rollout=replace(MINI_WARM_START_RECORDS.rollout, prompts_per_step=BATCH),
        gate=gate,
        steps=None,
    )


def test_one_epoch_is_the_default(tmp_path: Path) -> None:
    """Claim: whole batches of the training part, at least one; scenes take the steps they are told."""
    sources = build_sources(config(make_set(tmp_path / "a", ids_of_train(11), solution="s"), GateConfig()))
    assert sources.steps == 2
    assert sources.held_out is None, "nothing to hold out, and nothing asks for it"
    assert sources.train_text.startswith("11 records")
    assert build_sources(config(make_set(tmp_path / "b", ids_of_train(3), solution="s"), GateConfig())).steps == 1
    assert build_sources(MINI_WARM_START).steps == MINI_WARM_START.steps


def test_a_gate_that_nothing_can_be_measured_for_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="9 of 9 are of the training part"):
        build_sources(config(make_set(tmp_path / "a", ids_of_train(9), solution="s"), GateConfig(min_accuracy=0.5)))
    captions = make_set(tmp_path / "b", [f"r-{i}" for i in range(60)], solution=None)
    with pytest.raises(ConfigError, match=r"--min-auc 0\.8 needs answers that are known to be right or wrong"):
        build_sources(config(captions, GateConfig(min_auc=0.8)))
    assert build_sources(config(captions, GateConfig(min_accuracy=0.5))).held_out is not None


def test_prompts_are_cut_by_the_flags_of_pixels(tmp_path: Path) -> None:
    """Claim: of the 9 tokens of a picture of 96 x 96, --max-pixels of one token leaves one."""
    plain = config(make_set(tmp_path / "a", ids_of_train(4), solution="s"), GateConfig())
    for path in (tmp_path / "a" / "images").iterdir():
        Image.new("RGB", (96, 96)).save(path)
    limited = replace(plain, data=replace(plain.data, max_pixels=1024))
    enlarged = replace(plain, data=replace(plain.data, min_pixels=128 * 128))
    for wanted, flags in ((9, plain), (1, limited), (16, enlarged)):
        sources = build_sources(flags)
        renderer = sources.renderer
        for example in sources.train.batch(0):
            (image,) = example.prompt.images
            assert renderer.preprocessor.num_tokens(image.grid_thw) == wanted
            assert example.prompt.token_ids.count(renderer.image_token_id) == wanted


class Napping:
    """An engine that writes down what it is asked for."""

    policy_version = 0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        self.calls.append("generate")
        answer = Rollout((5,), (-0.1,), "stop", (VersionSpan(0, 0, 1),), Segments(None, None, "not judged"))
        return [(answer,) * len(numbers) for numbers in request.wanted]

    def wake(self) -> None:
        self.calls.append("wake")

    def sleep(self) -> None:
        self.calls.append("sleep")


def test_servers_on_the_trainers_gpus_sleep_while_a_step_trains() -> None:
    """They have released their memory whenever the discriminator learns, and are back before the next samples."""
    engine, example = Napping(), Example(Prompt("p", (5,), (), ""), Response((6,), Segments(None, None, "-")))
    rollout: Any = engine
    world: Any = SimpleNamespace(rank=0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        queue = RolloutQueue(
            rollout, lambda _: [example], Sampling(), n=2, seed=1, world=world, steps=range(2), ahead=0
        )
        pairs = SampledPairs(rollout, queue, None, Sampling(), hand_over=lambda: None, rollouts_apart=2, seed=2,
                             world=world)  # fmt: skip
        for step in range(2):
            pairs.take(step)
            engine.calls.append("train")
    finally:
        dist.destroy_process_group()
    assert engine.calls == ["wake", "generate", "sleep", "train"] * 2


def test_selected_prompts_are_all_that_is_learned_from(tmp_path: Path) -> None:
    """Claim: of scenes and of records; what is held out is not chosen from them."""
    path, ids = tmp_path / "selected.jsonl", [f"scene-drift-align-3-{index}" for index in range(16)]
    path.write_text("".join(f'{{"id": "{one}"}}\n' for one in ids))
    sources = build_sources(replace(mini_warm_start("drift"), prompts=path))
    for step in range(2):
        assert sorted(one.prompt.id for one in sources.train.batch(step)) == sorted(ids)
    assert isinstance(sources.held_out, SceneSource)
    assert sources.train_text == "16 selected scenes"
    names = ids_of_train(9)
    path.write_text("".join(f'{{"id": "{name}"}}\n' for name in names[:5]))
    held_out = [f"r-{i}" for i in range(90) if f"r-{i}" not in names]
    folder = make_set(tmp_path / "a", [*names, *held_out], solution="s")
    sources = build_sources(replace(config(folder, GateConfig(min_accuracy=0.5)), prompts=path))
    seen = {one.prompt.id for step in range(5) for one in sources.train.batch(step)}
    assert {name.partition(":")[2] or name for name in seen} == set(names[:5])
    assert sources.held_out is not None


def test_a_mini_world_warms_up_on_its_own_scenes() -> None:
    """Claim: pairs to learn from and those held out are of the world that ``--mini`` names."""
    for mini in ("habits", "drift"):
        sources = build_sources(mini_warm_start("drift" if mini == "drift" else "habits"))
        assert isinstance(sources.train, SceneSource) and isinstance(sources.held_out, SceneSource)
        found = [source.example(0).scene for source in (sources.train, sources.held_out)]
        assert [scene and (scene.world, scene.split) for scene in found] == [(mini, "sft"), (mini, "heldout")]
