"""Claim: what a step on fake tensors counts is what the same step on real ones holds, on every rank of a layout.

Both are counted by the same watch, for both players, without recompute and with it. On a CPU rank what the host
prepares is counted too: peaks may differ by 0.1 %, and the optimizer's part by a count of steps for each parameter.
Blind spot: an allocator's rounding, and what libraries take for themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.presets import preset
from prism_megatron.engine import logprobs
from prism_megatron.engine.dry.counted import Counted, CountedEngine
from prism_megatron.engine.dry.watch import Watch
from prism_megatron.engine.runtime import World
from prism_megatron.forecast.plays import Case, Play, settings_of, step
from prism_megatron.forecast.workload import Workload
from prism_megatron.testing import GlooWorld
from tests.integration.test_device_pass import lines_of

LAYOUTS = {"TP2": ParallelConfig(tp=2, sp="on"), "PP2": ParallelConfig(pp=2), "DP2": ParallelConfig()}


def small() -> Qwen3VLShape:
    """A dense model of 20 million parameters with a head size and rows for which the CPU has a flash kernel."""
    shape = preset("2B")
    text = dataclasses.replace(shape.text, num_layers=4, hidden=512, ffn=1024, heads=8, kv_heads=8, head_dim=64,
                               vocab=8192, mrope_section=(12, 10, 10))  # fmt: skip
    vision = dataclasses.replace(shape.vision, hidden=256, heads=4, ffn=512, depth=2, taps=(0, 1), out_hidden=512)
    return dataclasses.replace(shape, text=text, vision=vision, image_token_id=8000, video_token_id=8001)


def case_of(play: Play, parallel: ParallelConfig, recompute: bool) -> Case:
    return Case(
        play, small(), parallel, 0, 2, dtype=torch.float32, recompute=RecomputeConfig("full" if recompute else "none"),
        work=Workload(text_tokens=200, answer_tokens=256), towers=None,
    )  # fmt: skip


def real(world: World, case: Case) -> Counted:
    logprobs._CACHED_ELEMENTS = 2**40  # a GPU passes over all logits of a chunk at once
    with Watch("cpu") as watch:
        engine = CountedEngine(watch, world=world, **settings_of(case))
        for module in engine.modules:
            for parameter in module.parameters():
                parameter.data.normal_(std=0.02)
        assert engine.optimizer is not None
        engine.optimizer.reload_model_params()
        step(case, engine, world)
        return engine.counted


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(2) as world:
        yield world


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True], ids=["none", "full"])
@pytest.mark.parametrize("play", ["align", "judge"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_count_what_real_tensors_hold(
    gloo: GlooWorld, layout: str, play: Play, recompute: bool, tmp_path: Path
) -> None:
    """Claim: see the module."""
    case = case_of(play, LAYOUTS[layout], recompute)
    held = gloo.run(real, case, parallel=case.parallel)
    cases = {str(rank): dataclasses.replace(case, rank=rank) for rank in range(2)}
    for (rank, line), found in zip(lines_of(cases, tmp_path).items(), held, strict=True):
        counted = Counted(**line["counted"])
        print(rank, counted, found)
        assert (counted.parameters, counted.gradients) == (found.parameters, found.gradients)
        assert counted.optimizer == pytest.approx(found.optimizer, rel=1e-3)
        assert counted.step_peak == pytest.approx(found.step_peak, rel=1e-3)
        assert counted.pass_peak == pytest.approx(found.pass_peak, rel=1e-3)
