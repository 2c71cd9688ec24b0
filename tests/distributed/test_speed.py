"""Megatron's overlapped communication: the same steps as without, bit for bit, whatever reads the weights between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.fast_paths import FastPaths
from prism_megatron.engine.provider import LossFn, LossOutput, ModelProvider
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld
from tests.distributed import checkpoint_ranks, tiny

PLAIN = FastPaths()
REDUCE = FastPaths(overlap_grad_reduce=True, bucket_parameters=1)
GATHER = FastPaths(overlap_grad_reduce=True, overlap_param_gather=True, bucket_parameters=1)
"""Every weight by itself: none comes with another that was waited for."""
LAYOUTS = {
    "DP2": (2, ParallelConfig(), True),
    "DP2 untied": (2, ParallelConfig(), False),
    "TP2-SP-DP2": (4, ParallelConfig(tp=2, sp="on"), True),
    "PP2-DP2": (4, ParallelConfig(pp=2), True),
    "PP2-VPP2-DP2": (4, ParallelConfig(pp=2, vpp=2), True),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


Ran = tuple[list[tuple[float, float]], float, dict[str, Tensor], Counter[str]]


def run(world: World, fast: FastPaths, tied: bool, dtype: torch.dtype) -> Ran:
    """Four steps; after the second weights are exported, after the third a pass runs without gradients.

    The first step has one micro-batch, or one round of them, the others have more.
    """
    model = tiny.provider(tied=tied)
    engine = MegatronEngine(
        name="policy",
        provider=model,
        world=world,
        dtype=dtype,
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0),
        total_steps=20,
        fast=fast,
    )
    engine.load_hf(tiny.weights(model))
    batches, loss = tiny.batches_of(world, 0)
    engine.forward_backward(batches[: world.parallel.microbatches_of_a_rank], loss)
    engine.step()
    history = tiny.train(engine, range(1))
    between = tiny.exported(engine)
    history += tiny.train(engine, range(1, 2))
    batches, loss = tiny.batches_of(world, 5)
    asked = engine.forward(batches, loss).sums["loss"]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        history += tiny.train(engine, range(2, 3))
        assert not fast.overlap_param_gather or not unfinished(engine)
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
@pytest.mark.parametrize("fast", [REDUCE, GATHER], ids=["reduce", "gather"])
def test_overlapping_changes_no_bit(gloo: GlooWorld, layout: str, fast: FastPaths) -> None:
    """Claim: losses, weights between and after steps, and a pass without gradients are those of plain communication.

    Nothing is read before it has come. It happens bucket by bucket: there are more collectives. Sums over two ranks
    have no order, hence equality; norms, which add bucket by bucket, are equal to 1e-6, and nothing is clipped by them.
    Blind spot: gloo; what NCCL gains.
    """
    ranks, parallel, tied = LAYOUTS[layout]
    plain, other = (
        gloo.run(run, one, tied, torch.float32, num_ranks=ranks, parallel=parallel)[0] for one in (PLAIN, fast)
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


Role = Literal["policy with experts", "discriminator", "frozen vision"]


def provider_of(role: Role) -> ModelProvider:
    if role == "policy with experts":
        return checkpoint_ranks.provider("experts")
    shape = tiny.provider().shape
    return DiscriminatorProvider(
        shape, checkpoint_ranks.TOWERS, head_dropout=0.0, freeze_vision=role == "frozen vision"
    )


def run_role(world: World, fast: FastPaths, role: Role, offload: bool) -> dict[str, Tensor]:
    """Three steps of two passes, one and two, and a pass that has no gradients in each, as players take them."""
    model = provider_of(role)
    engine = MegatronEngine(
        name=role,
        provider=model,
        world=world,
        dtype=torch.float32,
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0, offload=offload),
        total_steps=9,
        fast=fast,
    )
    engine.load_hf(tiny.weights(model))
    for step in range(3):
        batches, policy_loss = tiny.batches_of(world, step)
        batches.append(without_images(world, step))
        loss: LossFn = policy_loss
        if role != "policy with experts":
            towers_Q = torch.tensor([0, 1], device=world.device)
            batches = [replace(batch, tower_ids_Q=towers_Q[: len(batch.lengths)]) for batch in batches]
            loss = squared_scores
        first = 0 if step == 1 else 1
        if first:
            engine.forward_backward(batches[:first], loss, more=True)
        engine.forward(batches, loss, more=True)
        engine.forward_backward(batches[first:], loss, adds=bool(first))
        assert engine.step().updated
    return tiny.exported(engine)


def without_images(world: World, step: int) -> Batch:
    """A micro-batch that shows the vision tower nothing; its gradients come all the same, as zeros."""
    row, mask = tiny.rows(step)[0]
    assert not row.images
    return collate([row], pad_token_id=tiny.PAD, multiple_of=1, device=world.device, token_extras={"mask": [mask]})


def squared_scores(scores_2_Q: Tensor, _batch: Batch) -> LossOutput:
    loss = (scores_2_Q[1] - 1.0).square().sum() / 8
    return LossOutput(loss, {"loss": loss.detach()})


@pytest.mark.parametrize(
    ("role", "parallel", "offload"),
    [
        ("policy with experts", ParallelConfig(ep=2), False),
        ("discriminator", ParallelConfig(), True),
        ("frozen vision", ParallelConfig(ep=2), False),
    ],
)
def test_steps_of_several_passes_are_those_of_plain_communication(
    gloo: GlooWorld, role: Role, parallel: ParallelConfig, offload: bool
) -> None:
    """Claim: for a policy and a discriminator with experts on ranks of their own, weights after three steps are equal.

    To the bit: both kinds of gradients are sums over two ranks. Where a first pass leaves its gradients to a second
    one, they are summed once, with those of the second, whatever number of passes other steps had.
    """
    plain, other = (
        gloo.run(run_role, fast, role, offload, num_ranks=2, parallel=parallel)[0] for fast in (PLAIN, GATHER)
    )
    assert other.keys() == plain.keys()
    assert [name for name, weight in plain.items() if not torch.equal(other[name], weight)] == []
