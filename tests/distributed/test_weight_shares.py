"""Each rank's share of an export: every tensor on just one rank, gathered to that rank and to no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConversionError
from prism_megatron.testing import GlooWorld
from tests.distributed import tiny
from tests.distributed.test_policy_experts import LOSSES, build
from tests.lazy_groups import lazy_collectives

DENSE = {
    "TP2-PP2": (4, ParallelConfig(tp=2, pp=2), {0, 2}),
    "PP2-VPP2": (2, ParallelConfig(pp=2, vpp=2), {0, 1}),
    "TP2-CP2": (4, ParallelConfig(tp=2, cp=2), {0}),
    "TP2-DP2": (4, ParallelConfig(tp=2), {0}),
}
SPARSE = {
    "EP2": (2, ParallelConfig(ep=2), {0, 1}),
    "TP2-EP2-ETP1": (2, ParallelConfig(tp=2, ep=2, etp=1), {0, 1}),
    "TP2-EP2-ETP2": (4, ParallelConfig(tp=2, ep=2, etp=2), {0, 2}),
    "DP2-EP2-PP2": (4, ParallelConfig(ep=2, pp=2), {0, 1, 2, 3}),
}
"""Ranks, layout, and which of the ranks send something."""
PADDING_BYTES = 4 * 64 * (128 - tiny.VOCAB)
"""Of the vocabulary, which is cut into equal shards."""


@dataclass(frozen=True)
class Found:
    """One rank's share, and what was gathered for it."""

    tensors: dict[str, Tensor]
    announced: dict[str, tuple[int, ...]]
    all_shapes: dict[str, tuple[int, ...]]
    left_out: tuple[frozenset[str], frozenset[str]]
    gathered_bytes: int
    other_collectives: int


def share_of(engine: MegatronEngine, *, changed_only: bool = False) -> Found:
    """Iterated while groups block as NCCL's do."""
    received, others = [0], [0]
    gather = dist.gather

    def counting(shards: Tensor, gathered: list[Tensor] | None, **how: Any) -> Any:
        received[0] += (len(gathered) - 1) * shards.nbytes if gathered else 0
        return gather(shards, gathered, **how)

    def counted(*_: Any, **__: Any) -> Any:
        others[0] += 1
        raise AssertionError("a share takes no collective but gathers")

    share = engine.export_share(20_000, layout="per_expert", changed_only=changed_only)
    with mock.patch.multiple(
        dist, gather=counting, broadcast=counted, all_gather_into_tensor=counted, all_reduce=counted
    ):
        tensors = {name: tensor.clone() for name, tensor in share}
    return Found(
        tensors,
        dict(share.own_shapes),
        dict(share.shapes),
        (frozenset(share.own_left_out), frozenset(share.left_out)),
        received[0],
        others[0],
    )


def dense_share(world: World) -> Found:
    with lazy_collectives():
        return share_of(tiny.build(world, optimizer=None))


def frozen_share(world: World) -> Found:
    return share_of(tiny.build(world, freeze_vision=True), changed_only=True)


def sparse_share(world: World) -> Found:
    with lazy_collectives():
        return share_of(build(world, LOSSES))


def whole_sparse(world: World) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in build(world, LOSSES).export_hf(layout="per_expert")}


def fused(world: World) -> str:
    engine = build(world, LOSSES)
    try:
        engine.export_share(layout="transformers")
    except ConversionError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def assert_shared_out(found: list[Found], expected: dict[str, Tensor], senders: set[int]) -> None:
    assert {rank for rank, share in enumerate(found) if share.tensors} == senders
    brought = [name for share in found for name in share.tensors]
    assert len(brought) == len(set(brought)), "a tensor is sent twice"
    assert set(brought) == expected.keys() == found[0].all_shapes.keys()
    for share in found:
        assert {name: tuple(tensor.shape) for name, tensor in share.tensors.items()} == share.announced
        assert all(torch.equal(tensor, expected[name]) for name, tensor in share.tensors.items())


@pytest.mark.parametrize("layout", DENSE)
def test_every_tensor_is_of_one_rank(gloo: GlooWorld, layout: str) -> None:
    """Claim: bit for bit what was loaded, each tensor by the first rank of its stage, with groups as lazy as NCCL's.

    What a rank receives of the others is at most what it sends on less its own shards: nothing for somebody else.
    """
    ranks, parallel, senders = DENSE[layout]
    source = tiny.weights(tiny.provider())
    found = gloo.run(dense_share, num_ranks=ranks, parallel=parallel)
    assert_shared_out(found, {name: source.get(name) for name in source.names()}, senders)
    for rank, share in enumerate(found):
        sent = sum(tensor.nbytes for tensor in share.tensors.values()) + (PADDING_BYTES if share.tensors else 0)
        assert share.gathered_bytes <= sent * (parallel.tp - 1) / parallel.tp
        assert (share.gathered_bytes > 0) == (parallel.tp > 1 and rank in senders)


def test_a_tied_embedding_is_sent_by_the_stage_that_holds_less(gloo: GlooWorld) -> None:
    """Claim: the last stage has a copy, and no vision tower; so it sends the vocabulary."""
    found = gloo.run(dense_share, num_ranks=2, parallel=ParallelConfig(pp=2))
    assert "model.language_model.embed_tokens.weight" in found[1].tensors
    first, last = (sum(tensor.nbytes for tensor in share.tensors.values()) for share in found)
    assert first > last, "blind: the last stage would hold more"


@pytest.mark.parametrize("layout", SPARSE)
def test_experts_are_sent_by_the_ranks_that_hold_them(gloo: GlooWorld, layout: str) -> None:
    """Claim: one by one, and all other tensors by the first of these ranks. Oracle: the whole export of one rank."""
    ranks, parallel, senders = SPARSE[layout]
    (expected,) = gloo.run(whole_sparse, num_ranks=1)
    assert_shared_out(gloo.run(sparse_share, num_ranks=ranks, parallel=parallel), expected, senders)


def test_frozen_weights_are_left_out_of_a_share(gloo: GlooWorld) -> None:
    """Claim: each rank knows which of them are its own, and together these are all."""
    found = gloo.run(frozen_share, num_ranks=2, parallel=ParallelConfig(pp=2))
    names = {name for name in tiny.weights(tiny.provider()).names() if ".visual." in name}
    assert found[0].left_out[1] == found[1].left_out[1] == names
    assert found[0].left_out[0] | found[1].left_out[0] == names and not found[0].left_out[0] & found[1].left_out[0]
    assert not any(".visual." in name for share in found for name in share.tensors)


def test_fused_experts_cannot_be_shared_out(gloo: GlooWorld) -> None:
    for message in gloo.run(fused, num_ranks=2, parallel=ParallelConfig(ep=2)):
        assert "experts in the layout 'transformers' have no one rank" in message
