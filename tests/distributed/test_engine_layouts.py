"""The same batches over every layout: splitting the world must not change a loss, a gradient norm or an update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.export import WeightTable
from prism_megatron.engine.gradients import gradient_of
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld
from tests.distributed import tiny

History = list[tuple[float, float]]
STEPS = 2

LAYOUTS = {
    "TP2-SP": (2, ParallelConfig(tp=2, sp="on")),
    "PP2": (2, ParallelConfig(pp=2)),
    "PP2-VPP2": (2, ParallelConfig(pp=2, vpp=2)),
    "DP2": (2, ParallelConfig()),
    "DP2-replicated": (2, ParallelConfig(distributed_optimizer=False)),
    "TP2-SP-DP2-replicated": (4, ParallelConfig(tp=2, sp="on", distributed_optimizer=False)),
    "TP2-PP2-DP2": (8, ParallelConfig(tp=2, pp=2)),
    "TP4-PP2": (8, ParallelConfig(tp=4, pp=2)),
    "TP4-PP2-SP": (8, ParallelConfig(tp=4, pp=2, sp="on")),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(8) as world:
        yield world


def run(world: World, dtype: torch.dtype) -> tuple[History, dict[str, Tensor]]:
    engine = tiny.build(world, dtype=dtype, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5))
    return tiny.train(engine, range(STEPS)), tiny.exported(engine)


@pytest.fixture(scope="module")
def single(gloo: GlooWorld) -> tuple[History, dict[str, Tensor]]:
    """One rank, fp32: the slow twin of every layout."""
    result: tuple[History, dict[str, Tensor]] = gloo.run(run, torch.float32, num_ranks=1)[0]
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_rank(
    gloo: GlooWorld, single: tuple[History, dict[str, Tensor]], layout: str
) -> None:
    """Claim: loss and gradient norm agree within 1e-5 relative, and each updated weight within 1e-4 relative.

    Data-parallel ranks learn from unequal numbers of tokens, rows share images across micro-batches, and the norm is
    above the clip. Adam divides by the root of tiny second moments, hence the wider bound on weights.
    Blind spot: one architecture, fp32 on CPU. ``pytest -rP`` prints the table.
    """
    ranks, parallel = LAYOUTS[layout]
    results = gloo.run(run, torch.float32, num_ranks=ranks, parallel=parallel)
    assert all(history == results[0][0] for history, _ in results), "ranks report different numbers"
    for mine, expected in zip(results[0][0], single[0], strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    weights = results[0][1]
    worst = max(float((weight - single[1][name]).norm() / single[1][name].norm()) for name, weight in weights.items())
    (loss, norm), (loss_1, norm_1) = results[0][0][-1], single[0][-1]
    print(f"{layout:24} loss {loss:.7f} ({loss_1:.7f})  gradient norm {norm:.6f} ({norm_1:.6f})  weights {worst:.1e}")
    assert weights.keys() == single[1].keys()
    assert worst <= 1e-4


def test_bf16_follows_fp32_with_fp32_masters(gloo: GlooWorld, single: tuple[History, dict[str, Tensor]]) -> None:
    """Claim: bf16 parameters train through fp32 masters, with and without sharded optimizer state, near fp32 (2 %)."""
    for distributed in (True, False):
        parallel = ParallelConfig(tp=2, distributed_optimizer=distributed)
        history, weights = gloo.run(run, torch.bfloat16, num_ranks=4, parallel=parallel)[0]
        for mine, expected in zip(history, single[0], strict=True):
            assert mine == pytest.approx(expected, rel=2e-2)
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def export_untrained(world: World, bucket_bytes: int) -> tuple[bool, list[tuple[int, int]], int]:
    """Whether all is as loaded; parameters and bytes of each bucket; the bytes that a norm's weight keeps alive."""
    engine = tiny.build(world, tied=False, optimizer=None)
    source = tiny.weights(tiny.provider(tied=False))
    gather, buckets = WeightTable._gather, []

    def measured(table: WeightTable, bucket: Sequence[Any], *arguments: Any) -> Tensor:
        gathered = gather(table, bucket, *arguments)
        buckets.append((len(bucket), gathered.nbytes))
        return gathered

    with mock.patch.object(WeightTable, "_gather", measured):
        exported = dict(engine.export_hf(bucket_bytes))
    as_loaded = exported.keys() == set(source.names()) and all(
        torch.equal(tensor, source.get(name)) for name, tensor in exported.items()
    )
    return as_loaded, buckets, exported["model.language_model.norm.weight"].untyped_storage().nbytes()


@pytest.mark.parametrize("bucket_bytes", [1, 50_000, 2**30])
def test_export_returns_what_was_loaded_on_every_rank(gloo: GlooWorld, bucket_bytes: int) -> None:
    """Claim: load then export is the identity, bit for bit, at TP4-PP2, whatever the bucket size.

    A bucket holds no more than that of full tensors, or one parameter; what is kept of it is not the whole of it.
    """
    for as_loaded, buckets, norm_bytes in gloo.run(export_untrained, bucket_bytes, parallel=ParallelConfig(tp=4, pp=2)):
        assert as_loaded
        assert all(count == 1 or size <= bucket_bytes for count, size in buckets), buckets
        assert (max(count for count, _ in buckets) > 1) == (bucket_bytes > 1)
        assert norm_bytes == 4 * 64


def rows_and_sums(world: World) -> tuple[list[list[float]], float]:
    engine = tiny.build(world, optimizer=None)
    batches, loss = tiny.batches_of(world, step=0)
    output = engine.forward(batches, loss)
    return [row["logprob"].tolist() for row in output.rows], output.sums["loss"]


def test_forward_brings_rows_to_every_stage(gloo: GlooWorld) -> None:
    """Claim: per-row results of the last stage stand, in micro-batch order, on every rank; sums add over DP."""
    alone, total = gloo.run(rows_and_sums, num_ranks=1)[0]
    split = gloo.run(rows_and_sums, num_ranks=4, parallel=ParallelConfig(pp=2))
    for rank, (rows, loss) in enumerate(split):
        mine = alone[:2] if rank % 2 == 0 else alone[2:]
        assert list(chain.from_iterable(rows)) == pytest.approx(list(chain.from_iterable(mine)), rel=1e-5)
        assert loss == pytest.approx(total, rel=1e-6)


def step_on_infinite_gradient(world: World) -> tuple[bool, float, bool]:
    engine = tiny.build(world)
    before = tiny.exported(engine)
    batches, loss = tiny.batches_of(world, step=0)

    def explode(logits: Tensor, batch: object) -> LossOutput:
        output = loss(logits, batch)
        factor = float("inf") if world.dp_rank == 0 else 1.0
        return LossOutput(loss=output.loss * factor, sums=output.sums)

    engine.forward_backward(batches, explode)
    result = engine.step()
    after = tiny.exported(engine)
    return result.updated, result.grad_norm, all(torch.equal(before[name], after[name]) for name in before)


def test_a_gradient_that_is_not_finite_changes_nothing(gloo: GlooWorld) -> None:
    """Claim: one rank's infinite loss makes every rank skip the update."""
    results = gloo.run(step_on_infinite_gradient, num_ranks=2)
    assert results == [(False, float("inf"), True)] * 2


def frozen_vision(world: World) -> tuple[bool, bool]:
    engine = tiny.build(world, freeze_vision=True)
    before = tiny.exported(engine)
    tiny.train(engine, range(1))
    after = tiny.exported(engine)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith("model.visual.")}
    return not changed & frozen, changed == before.keys() - frozen


def test_frozen_parameters_stay_as_loaded(gloo: GlooWorld) -> None:
    """Claim: with the vision tower frozen no vision weight moves and every other weight does."""
    assert gloo.run(frozen_vision, num_ranks=2, parallel=ParallelConfig(pp=2))[0] == (True, True)


def spread_of_one_copy(world: World) -> tuple[float, float]:
    """As a pass leaves it, and with the first replicated weight's gradient a hundredth larger on the second rank."""
    engine = tiny.build(world)
    engine.forward_backward(*tiny.batches_of(world, step=0))
    before = engine.gradient_spread()
    _, parameter = engine.weights.replicated()[0]
    if world.tp_rank == 1:
        gradient_of(parameter).mul_(1.01)
    return before, engine.gradient_spread()


def test_a_copy_with_another_gradient_is_seen(gloo: GlooWorld) -> None:
    """Claim: one weight whose copies would drift apart shows on the rank that errs, by the share that it errs by."""
    (before, right), (also_before, wrong) = gloo.run(spread_of_one_copy, num_ranks=2, parallel=ParallelConfig(tp=2))
    assert max(before, also_before, right) < 1e-6
    assert wrong == pytest.approx(0.01, rel=1e-3)
