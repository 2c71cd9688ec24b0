"""Claim: what a step on fake tensors counts is what the same step on real ones holds, on every rank of a layout, and
the process is larger by that much while it runs.

Both are counted by the same watch, for both players, without recompute and with it. On a CPU rank what the host
prepares is counted too: peaks may differ by 0.1 %, and the optimizer's part by a count of steps for each parameter.
Passes hold more than all gradients, which gloo's reduce-scatter, unlike NCCL's, copies whole after the last of them.
Linux tells how large the process is: 10 % are for Python's objects, gloo's buffers and what kernels lay out anew.
Blind spot: a GPU's allocator, and what its libraries take for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import pytest
import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.engine.dry.counted import Counted
from prism_megatron.forecast.plays import Case, Play
from prism_megatron.forecast.verdict import held
from prism_megatron.forecast.workload import Workload
from prism_megatron.testing import GlooWorld
from tests.distributed.counted_ranks import Found, shape_of, steps
from tests.integration.test_device_pass import lines_of

RANKS = 2
LAYOUTS = {"TP2": ParallelConfig(tp=2, sp="on"), "PP2": ParallelConfig(pp=2), "DP2": ParallelConfig()}
KINDS: tuple[tuple[Play, Literal["none", "full"]], ...] = (
    ("align", "none"), ("align", "full"), ("judge", "none"), ("judge", "full"),
)  # fmt: skip
"""Who plays, and what is recomputed."""
ROLLOUTS = {"align": 3, "judge": 2}
"""Of each prompt: a judge reads them as two segments each, and their reference. They fill two micro-batches."""


@dataclass(frozen=True)
class Both:
    """What was counted of fakes, and found of real tensors, by rank."""

    fakes: Sequence[Counted]
    real: Sequence[Found]


def case_of(play: Play, layout: str, recompute: Literal["none", "full"]) -> Case:
    return Case(
        play,
        shape_of(hidden=512, ffn=2048, vocab=8192),
        LAYOUTS[layout],
        world_size=RANKS,
        work=Workload(rollouts=ROLLOUTS[play], text_tokens=200, answer_tokens=256),
        recompute=RecomputeConfig(recompute),
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Mapping[tuple[str, str], Both]]]:
    """By layout: all steps of it are played at once, on fakes in one process and on two ranks."""
    with GlooWorld(RANKS, timeout_s=1200) as gloo:

        @cache
        def of_layout(layout: str) -> Mapping[tuple[str, str], Both]:
            cases = {kind: case_of(kind[0], layout, kind[1]) for kind in KINDS}
            places = {
                f"{kind} {rank}": replace(case, rank=rank) for kind, case in cases.items() for rank in range(RANKS)
            }
            lines = lines_of(places, tmp_path_factory.mktemp(layout))
            ranks = gloo.run(steps, list(cases.values()), parallel=LAYOUTS[layout])
            return {
                kind: Both(
                    [Counted(**lines[f"{kind} {rank}"]["counted"]) for rank in range(RANKS)],
                    [of_rank[number] for of_rank in ranks],
                )
                for number, kind in enumerate(cases)
            }

        yield of_layout


every_step = pytest.mark.parametrize(
    ("layout", "play", "recompute"), [(layout, *kind) for layout in LAYOUTS for kind in KINDS]
)


@pytest.mark.slow
@every_step
def test_fakes_count_what_real_tensors_hold(
    found: Callable[[str], Mapping[tuple[str, str], Both]], layout: str, play: str, recompute: str
) -> None:
    """Claim: see the module."""
    both = found(layout)[play, recompute]
    for fake, real in zip(both.fakes, (one.counted for one in both.real), strict=True):
        print(fake, real)
        assert (fake.parameters, fake.gradients) == (real.parameters, real.gradients)
        assert fake.optimizer == pytest.approx(real.optimizer, rel=1e-3)
        assert fake.step_peak == pytest.approx(real.step_peak, rel=1e-3)
        assert fake.pass_peak == pytest.approx(real.pass_peak, rel=1e-3)


@pytest.mark.slow
@every_step
def test_a_process_grows_by_what_was_counted(
    found: Callable[[str], Mapping[tuple[str, str], Both]], layout: str, play: str, recompute: str
) -> None:
    """Claim: see the module. Resident memory, from before the engine was built to the step's peak."""
    both = found(layout)[play, recompute]
    for rank, (fake, real) in enumerate(zip(both.fakes, both.real, strict=True)):
        counted = held(fake) + max(fake.pass_peak, fake.step_peak)
        print(
            f"{play:<6} {layout} rank {rank} recompute {recompute:<5} counted {counted / 2**20:6.1f} MiB, resident "
            f"{real.resident / 2**20:6.1f} MiB, {real.resident / counted:.3f}"
        )
        assert real.resident == pytest.approx(counted, rel=0.1)
