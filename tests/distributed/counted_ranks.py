"""What each rank does in the tests of counted memory: a step on real tensors, counted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.presets import preset
from prism_megatron.engine import logprobs
from prism_megatron.engine.dry.counted import Counted, CountedEngine
from prism_megatron.engine.dry.watch import Watch
from prism_megatron.engine.runtime import World
from prism_megatron.forecast.plays import Case, settings_of, step
from tests.resident import forget_peak, give_back, peak_resident, resident, settle


@dataclass(frozen=True)
class Found:
    """Of one step on one rank."""

    counted: Counted
    resident: int
    """most bytes that the process held beyond those before its engine was built"""


def shape_of(*, hidden: int, ffn: int, vocab: int) -> Qwen3VLShape:
    """A dense model of four layers, with a head size and rows for which the CPU has a flash kernel."""
    shape = preset("2B")
    heads = hidden // 64
    text = replace(shape.text, num_layers=4, hidden=hidden, ffn=ffn, heads=heads, kv_heads=heads, head_dim=64,
                   vocab=vocab, mrope_section=(12, 10, 10))  # fmt: skip
    vision = replace(shape.vision, hidden=256, heads=4, ffn=512, depth=2, taps=(0, 1), out_hidden=hidden)
    return replace(shape, text=text, vision=vision, image_token_id=vocab - 2, video_token_id=vocab - 1)


def steps(world: World, cases: Sequence[Case]) -> list[Found]:
    """Play the cases one after the other.

    A small model plays a role's step before its first one, so that what libraries load and keep at their first call is
    there already.
    """
    logprobs._CACHED_ELEMENTS = 2**40  # a GPU passes over all logits of a chunk at once
    give_back()
    for play in {case.play: case for case in cases}.values():
        _played(world, replace(play, shape=shape_of(hidden=128, ffn=256, vocab=1024)))
    return [_played(world, case) for case in cases]


def _played(world: World, case: Case) -> Found:
    settle()
    before = resident()
    with Watch("cpu") as watch:
        engine = CountedEngine(watch, world=world, **settings_of(case))
        for module in engine.modules:
            for parameter in module.parameters():
                parameter.data.normal_(std=0.02)
        assert engine.optimizer is not None
        engine.optimizer.reload_model_params()
        settle()
        forget_peak()
        step(case, engine, world)
        return Found(engine.counted, peak_resident() - before)
