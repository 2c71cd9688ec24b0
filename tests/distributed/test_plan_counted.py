"""Claim: what a plan counts of a run is what CPU ranks hold: weights and gradients to the byte, peaks within 10 %.

Three stages' steps (SFT, alignment with both players, RLVR) in two layouts each, on models of eight layers to a stage,
which a plan counts from four and six. Each role is a step of its own. The process is what Linux says is resident, as
in ``test_counted.py``, which has other layouts, and whose blind spot this has too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.dry.counted import Counted
from prism_megatron.forecast.plays import Case, Play
from prism_megatron.forecast.verdict import held
from prism_megatron.forecast.workload import Workload
from prism_megatron.planning.depth import counted
from prism_megatron.testing import GlooWorld
from tests.distributed.counted_ranks import Found, shape_of, steps

RANKS = 2
LAYERS = 8
LAYOUTS = {"TP2": ParallelConfig(tp=2, sp="on"), "PP2": ParallelConfig(pp=2)}
ROLLOUTS: Mapping[Play, int] = {"sft": 6, "align": 3, "judge": 2, "rlvr": 3}


@dataclass(frozen=True)
class Both:
    """By rank."""

    planned: list[Counted]
    real: list[Found]


def case_of(play: Play, layout: str) -> Case:
    shape = shape_of(hidden=512, ffn=2048, vocab=8192)
    layers = LAYERS * LAYOUTS[layout].pp
    return Case(
        play,
        replace(shape, text=replace(shape.text, num_layers=layers)),
        LAYOUTS[layout],
        world_size=RANKS,
        work=Workload(rollouts=ROLLOUTS[play], text_tokens=200, answer_tokens=256),
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def found() -> Iterator[Mapping[tuple[str, Play], Both]]:
    both: dict[tuple[str, Play], Both] = {}
    with GlooWorld(RANKS, timeout_s=1800) as gloo:
        for layout, parallel in LAYOUTS.items():
            cases = [case_of(play, layout) for play in ROLLOUTS]
            ranks = gloo.run(steps, cases, parallel=parallel)
            for number, case in enumerate(cases):
                planned = counted([replace(case, rank=rank) for rank in range(RANKS)])
                both[layout, case.play] = Both(planned, [of_rank[number] for of_rank in ranks])
        yield both


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("play", ROLLOUTS)
def test_a_plan_is_what_ranks_hold(found: Mapping[tuple[str, Play], Both], play: Play, layout: str) -> None:
    """Claim: see the module."""
    both = found[layout, play]
    for rank, (plan, real) in enumerate(zip(both.planned, both.real, strict=True)):
        needed = held(plan) + max(plan.pass_peak, plan.step_peak)
        print(
            f"{play} {layout} rank {rank}: planned {needed / 2**20:.1f} MiB, resident {real.resident / 2**20:.1f} MiB, "
            f"{real.resident / needed:.3f}"
        )
        assert (plan.parameters, plan.gradients) == (real.counted.parameters, real.counted.gradients)
        assert plan.optimizer == pytest.approx(real.counted.optimizer, rel=1e-3)
        assert real.resident == pytest.approx(needed, rel=0.1)
