"""Megatron's overlapped communication: the same steps as without, bit for bit, whatever reads the weights between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.speed import SpeedConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld
from tests.distributed import tiny

PLAIN = SpeedConfig()
REDUCE = SpeedConfig(overlap_grad_reduce=True, bucket_parameters=1)
GATHER = SpeedConfig(overlap_grad_reduce=True, overlap_param_gather=True, bucket_parameters=1)
"""Every weight by itself: none comes with another that was waited for."""
LAYOUTS = {
    "DP2": (2, ParallelConfig(), True),
    "DP2 untied": (2, ParallelConfig(), False),
    "TP2-SP-DP2": (4, ParallelConfig(tp=2, sp="on"), True),
    "PP2-DP2": (4, ParallelConfig(pp=2), True),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


Ran = tuple[list[tuple[float, float]], float, dict[str, Tensor], Counter[str]]


def run(world: World, speed: SpeedConfig, tied: bool, dtype: torch.dtype) -> Ran:
    """Four steps; after the second weights are exported, after the third a pass runs without gradients.

    The first step has one micro-batch, the others have more.
    """
    model = tiny.provider(tied=tied)
    engine = MegatronEngine(
        name="policy",
        provider=model,
        world=world,
        dtype=dtype,
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0),
        total_steps=20,
        speed=speed,
    )
    engine.load_hf(tiny.weights(model))
    batches, loss = tiny.batches_of(world, 0)
    engine.forward_backward(batches[:1], loss)
    engine.step()
    history = tiny.train(engine, range(1))
    between = tiny.exported(engine)
    history += tiny.train(engine, range(1, 2))
    batches, loss = tiny.batches_of(world, 5)
    asked = engine.forward(batches, loss).sums["loss"]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        history += tiny.train(engine, range(2, 3))
        assert not speed.overlap_param_gather or not unfinished(engine)
    calls = Counter(event.name for event in profiled.events() if event.name.startswith("c10d::"))
    after = {f"after {name}": tensor for name, tensor in tiny.exported(engine).items()}
    return history, asked, {**between, **after}, calls


def unfinished(engine: MegatronEngine) -> int:
    """Gathers that a pass began and nobody has waited for."""
    batches, loss = tiny.batches_of(engine.world, 3)
    engine.forward(batches, loss)
    groups = [group for chunk in engine._chunks for group in chunk.bucket_groups]
    assert all(group.param_gather_dispatched for group in groups)
    return sum(group.param_gather_handle is not None for group in groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("speed", [REDUCE, GATHER], ids=["reduce", "gather"])
def test_overlapping_changes_no_bit(gloo: GlooWorld, layout: str, speed: SpeedConfig) -> None:
    """Claim: losses, weights between and after steps, and a pass without gradients are those of plain communication.

    Nothing is read before it has come. It happens bucket by bucket: there are more collectives. Sums over two ranks
    have no order, hence equality; norms, which add bucket by bucket, are equal to 1e-6, and nothing is clipped by them.
    Blind spot: gloo; what NCCL gains.
    """
    ranks, parallel, tied = LAYOUTS[layout]
    plain, other = (
        gloo.run(run, one, tied, torch.float32, num_ranks=ranks, parallel=parallel)[0] for one in (PLAIN, speed)
    )
    assert other[0] == [pytest.approx(step, rel=1e-6) for step in plain[0]]
    assert [loss for loss, _ in other[0]] == [loss for loss, _ in plain[0]]
    assert other[1] == plain[1]
    assert other[2].keys() == plain[2].keys()
    assert [name for name, weight in plain[2].items() if not torch.equal(other[2][name], weight)] == []
    assert sum(other[3].values()) > sum(plain[3].values())


def test_bf16_gathers_what_its_masters_became(gloo: GlooWorld) -> None:
    plain, other = (gloo.run(run, one, False, torch.bfloat16, num_ranks=2)[0] for one in (PLAIN, GATHER))
    assert all(torch.equal(other[2][name], weight) for name, weight in plain[2].items())
