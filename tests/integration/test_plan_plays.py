"""Claims: a deep model's step is found from two shallow plays of it, and arithmetic finds it without any.

Models are narrow and deep, in every way that depth and arithmetic may go wrong: experts, both players, pipeline stages,
context parallelism, all settings of recomputation, a trained vision tower. Blind spot: virtual stages, which are not
played at all, and published widths (one case with --slow).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.presets import preset
from prism_megatron.engine.dry.counted import Counted
from prism_megatron.forecast.before_start import played
from prism_megatron.forecast.plays import Case
from prism_megatron.forecast.verdict import held
from prism_megatron.forecast.workload import Workload
from prism_megatron.planning.depth import counted
from prism_megatron.planning.needs import ESTIMATE_ERROR, estimated
from tests.unit.planning.published import MUST_FIT

EXTRAPOLATION_ERROR = 0.01
"""Optimizers pad their buffers, and the largest of several peaks may be another one at another depth."""


def narrow(model: str, layers: int) -> Qwen3VLShape:
    """The kind of model in a sixteenth of its weights, with blocks enough for three taps."""
    shape = preset(model)
    text = replace(shape.text, num_layers=layers, hidden=1024, ffn=3072, heads=8, kv_heads=4, vocab=151936)
    if text.num_experts:
        text = replace(text, num_experts=8, experts_per_token=2, expert_ffn=512)
    vision = replace(shape.vision, depth=3, taps=(0, 1, 2), hidden=512, heads=8, ffn=1024, out_hidden=1024)
    return replace(shape, text=text, vision=vision)


WORK = Workload(prompts=2, rollouts=2, text_tokens=512, image_grid=(1, 32, 32), answer_tokens=2048,
                tokens_per_microbatch=5120, share_prompts=True)  # fmt: skip
ROWS = replace(WORK, prompts=1, rollouts=2, tokens_per_microbatch=2816, share_prompts=False)
MLP = RecomputeConfig("selective", ("mlp",))
FULL = RecomputeConfig("full")
CASES = {
    "rows, dense": Case("sft", narrow("4B", 10), ParallelConfig(), 0, 1, ROWS, freeze=ALL_VISION),
    "rows, experts, recomputed": Case(
        "sft", narrow("30B-A3B", 10), ParallelConfig(ep=4), 0, 4, replace(ROWS, rollouts=4), FULL, freeze=ALL_VISION
    ),
    "answers, TP2 SP, MLP recomputed": Case("align", narrow("4B", 10), ParallelConfig(tp=2, sp="on"), 0, 2, WORK, MLP),
    "answers, CP2": Case("align", narrow("4B", 10), ParallelConfig(cp=2), 0, 2, WORK),
    "answers, PP2, first": Case("align", narrow("4B", 20), ParallelConfig(pp=2), 0, 2, WORK),
    "answers, PP2, last": Case("align", narrow("4B", 20), ParallelConfig(pp=2), 1, 2, WORK),
    "judge, TP2 EP2": Case("judge", narrow("2B", 10), ParallelConfig(tp=2, ep=2), 0, 4, WORK, towers=Towers()),
    "judge, recomputed": Case("judge", narrow("2B", 10), ParallelConfig(), 0, 1, WORK, FULL, towers=Towers()),
}


IN_CI = ("rows, experts, recomputed", "judge, recomputed")
"""Where plays found a graph that was held; the others run with --slow."""
EVERY_CASE = [pytest.param(name, marks=pytest.mark.long if name in IN_CI else pytest.mark.slow) for name in CASES]


@cache
def whole(name: str) -> Counted:
    """A case played at its whole depth."""
    (line,) = played([CASES[name]])
    assert "error" not in line, line
    return Counted(**line["counted"])


@pytest.mark.parametrize("name", EVERY_CASE)
def test_two_shallow_plays_tell_a_deep_one(name: str) -> None:
    """Claim: weights and gradients to the byte, all else within 1 % of what a rank holds."""
    deep, (told,) = whole(name), counted([CASES[name]])
    print(f"{name}: {deep} told as {told}")
    assert (told.parameters, told.gradients) == (deep.parameters, deep.gradients)
    assert told.optimizer == pytest.approx(deep.optimizer, rel=EXTRAPOLATION_ERROR)
    assert told.pass_peak == pytest.approx(deep.pass_peak, rel=EXTRAPOLATION_ERROR)
    assert needed(told) == pytest.approx(needed(deep), rel=EXTRAPOLATION_ERROR)


@pytest.mark.parametrize("name", EVERY_CASE)
def test_arithmetic_tells_what_a_rank_needs(name: str) -> None:
    """Claim: all that a rank holds at its worst within ``ESTIMATE_ERROR``; weights but for Megatron's padding."""
    deep, told = whole(name), estimated(CASES[name])
    print(f"{name}: {needed(told) / needed(deep):.3f} of {needed(deep) / 2**30:.2f} GiB; {deep} told as {told}")
    assert told.parameters == pytest.approx(deep.parameters, rel=1e-3)
    assert told.gradients == pytest.approx(deep.gradients, rel=1e-3)
    assert needed(told) == pytest.approx(needed(deep), rel=ESTIMATE_ERROR)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUST_FIT)
def test_published_layouts_are_counted_as_estimated(name: str) -> None:
    """Claim: at published widths, experts by the hundred among them, plays and arithmetic agree as above, and fit."""
    case = MUST_FIT[name].planned().policy
    ranks = {0, case.world_size - 1} if case.parallel.pp > 1 else {0}
    cases = [replace(case, rank=rank) for rank in sorted(ranks)]
    for one, found in zip(cases, counted(cases), strict=True):
        told = estimated(one)
        print(f"{name}, rank {one.rank}: {needed(found) / 2**30:.2f} GiB, told {needed(told) / 2**30:.2f}")
        assert needed(told) == pytest.approx(needed(found), rel=ESTIMATE_ERROR)
        assert needed(found) <= 79 * 2**30


def needed(one: Counted) -> int:
    """Bytes of a role at its worst."""
    return held(one) + max(one.pass_peak, one.step_peak)
