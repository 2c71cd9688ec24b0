"""The same round of the game in every layout: losses, gradient norms and all scores (blind spot: bf16, CUDA)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.testing import GlooWorld
from prism_megatron.types import RolloutGroup
from tests.parity.align_ranks import one_round, sample

# Micro-batches hold all prompts, about two, or less than one of them (whose reference is then repeated).
ALL, SOME, FEW = 16384, 700, 260
LAYOUTS = {
    "TP1·PP1": (1, ParallelConfig(), ALL),
    "TP1·PP1, shared prompts": (1, ParallelConfig(), ALL),
    "TP1·PP1, small micro-batches": (1, ParallelConfig(), FEW),
    "TP1·PP1, plain optimizer": (1, ParallelConfig(distributed_optimizer=False), SOME),
    "TP2·SP": (2, ParallelConfig(tp=2, sp="on"), FEW),
    "TP4·PP2": (8, ParallelConfig(tp=4, pp=2), SOME),
    "PP2·VPP2": (2, ParallelConfig(pp=2, vpp=2), FEW),
    "CP2": (2, ParallelConfig(cp=2), FEW),
    "CP2, a2a": (2, ParallelConfig(cp=2, cp_comm="a2a"), FEW),
    "TP2·SP·CP2·PP2": (8, ParallelConfig(tp=2, cp=2, pp=2), SOME),
    "DP2, unequal valid counts": (2, ParallelConfig(), SOME),
    "DP8, more ranks than prompts": (8, ParallelConfig(), SOME),
    "DP7, no whole number of prompts": (7, ParallelConfig(), FEW),
    "EP2": (2, ParallelConfig(ep=2), FEW),
    "TP2·EP2·PP2": (4, ParallelConfig(tp=2, ep=2, pp=2), SOME),
}
# fp32 sums of a few thousand terms in another order; 1e-4 is what the project promises, measured is about 1e-6.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(8) as world:
        yield world


@pytest.fixture(scope="module")
def groups(gloo: GlooWorld) -> Sequence[RolloutGroup]:
    (sampled,) = gloo.run(sample, num_ranks=1)
    valid = [[rollout.segments.valid for rollout in group.rollouts] for group in sampled]
    assert sum(valid[0]) + sum(valid[2]) < sum(valid[1]) + sum(valid[3]), "the halves must differ in valid answers"
    return list(sampled)


def test_every_layout_gives_the_same_round(
    gloo: GlooWorld, groups: Sequence[RolloutGroup], capsys: pytest.CaptureFixture[str]
) -> None:
    """Policy loss, discriminator loss, both gradient norms and every score agree with TP1·PP1."""
    table: list[str] = []
    reference = None
    worst = 0.0
    for name, (num_ranks, parallel, tokens) in LAYOUTS.items():
        share_prompts = reference is not None  # the first is the slow twin: every sequence whole, in one micro-batch
        results = gloo.run(one_round, groups, tokens, share_prompts, parallel=parallel, num_ranks=num_ranks)
        assert all(result == results[0] for result in results), f"{name}: ranks disagree"
        result = results[0]
        reference = reference or result
        errors = {key: relative_error(result[key], reference[key]) for key in reference}
        worst = max(worst, *errors.values())
        cells = "  ".join(f"{result[key]:12.6f} {errors[key]:8.1e}" for key in reference if key != "scores")
        table.append(f"{name:34} {cells}  {errors['scores']:8.1e}")
    header = "  ".join(f"{key:>21}" for key in reference or () if key != "scores")
    with capsys.disabled():
        print(f"\n{'layout (value, relative error)':34} {header}    scores", *table, sep="\n")
    assert worst < TOLERANCE


def relative_error(value: float | Sequence[float], reference: float | Sequence[float]) -> float:
    """Largest difference over the largest reference magnitude."""
    a, b = np.atleast_1d(value), np.atleast_1d(reference)
    return float(np.abs(a - b).max() / np.abs(b).max())
