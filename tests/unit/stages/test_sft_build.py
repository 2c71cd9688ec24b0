"""How often an epoch of fine-tuning shows each source, and what its samples cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron.commands.sft import parse
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.presets import preset
from prism_megatron.config.stages.demonstrations import DemonstrationsConfig
from prism_megatron.data.render import Renderer
from prism_megatron.data.teachers import Teacher, write
from prism_megatron.observability.model_flops import Arithmetic
from prism_megatron.stages.sft.build import _scenes, _times, cost_of
from tests.unit.data.stream.test_plan import samples_of_lengths


def test_weights_are_shares_of_an_epoch() -> None:
    """Claim: of 80 and 20 records, weights of 1 and 3 make 25 and 75 of 100; repeats are taken as they are."""
    samples = samples_of_lengths([8] * 100, [0] * 80 + [1] * 20)
    assert _times(DemonstrationsConfig(weights=("a=1", "b=3")), samples) == {"a": 25 / 80, "b": 75 / 20}
    assert _times(DemonstrationsConfig(repeats=("a=0.5",)), samples) == {"a": 0.5}
    assert _times(DemonstrationsConfig(), samples) == {}


def test_a_visual_token_of_a_frozen_tower_weighs_a_third() -> None:
    """Claim: FLOPs of forward and backward, against those of the forward pass alone; a text token always trains."""
    shape = preset("4B")
    arithmetic, merge = Arithmetic.of(shape), shape.vision.merge
    frozen, trained = cost_of(shape, ("vision", "projector")), cost_of(shape, ())
    forward = arithmetic.patch * merge**2 + arithmetic.merged
    assert frozen.visual_token == pytest.approx(2 * forward)
    assert trained.visual_token == pytest.approx(6 * forward)
    assert frozen.token == trained.token == 6 * arithmetic.token
    assert frozen.token_pair == pytest.approx(3 * arithmetic.pair)


def test_each_mini_world_has_its_own_scenes_and_teacher() -> None:
    """Claim: of 64 scenes about three in four are the sloppy teacher's of that world, and the rest are faithful."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    world: Any = SimpleNamespace(dp_rank=0, dp_size=1)
    teachers: dict[str, Teacher] = {"habits": "sloppy", "drift": "misreading"}
    for mini, teacher in teachers.items():
        config = parse(["--mini", mini])
        lessons: Any = _scenes(config, renderer, "sft", world)
        examples = [lessons._scenes.example(number) for number in range(64)]
        assert {example.scene.world for example in examples} == {mini}
        wanted = [write(one.scene, teacher, faithful_share=0.25, seed=config.seed) for one in examples]
        assert [one.reference for one in examples] == [renderer.response(*text) for text in wanted]
        faithful = [one.reference == renderer.response(*write(one.scene, "faithful")) for one in examples]
        assert 0.1 <= sum(faithful) / len(faithful) <= 0.5
