"""The test kit itself: results come back per rank, layouts change on one set of processes, failures are told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld, RankError


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def place(world: World) -> tuple[int, int, int, int]:
    return world.rank, world.tp_rank, world.pp_rank, world.dp_rank


def sum_of_ranks(world: World) -> float:
    total = torch.tensor([float(world.rank)])
    dist.all_reduce(total, group=world.groups.mp)
    return float(total)


def fail_on_last(world: World) -> None:
    if world.rank == world.world_size - 1:
        raise ValueError("the last rank gives up")


def test_layouts_follow_megatrons_order_on_the_same_processes(gloo: GlooWorld) -> None:
    """Claim: tp varies fastest, then dp, then pp; one world serves several layouts in turn."""
    assert gloo.run(place, parallel=ParallelConfig(tp=2, pp=2)) == [(0, 0, 0, 0), (1, 1, 0, 0), (2, 0, 1, 0), (3, 1, 1, 0)]
    assert gloo.run(place, parallel=ParallelConfig(tp=2)) == [(0, 0, 0, 0), (1, 1, 0, 0), (2, 0, 0, 1), (3, 1, 0, 1)]
    assert gloo.run(place, num_ranks=2, parallel=ParallelConfig(pp=2)) == [(0, 0, 0, 0), (1, 0, 1, 0)]


def test_collectives_run_in_the_groups_of_the_layout(gloo: GlooWorld) -> None:
    """Claim: a group holds the ranks of its model-parallel block only."""
    assert gloo.run(sum_of_ranks, parallel=ParallelConfig(tp=2)) == [1.0, 1.0, 5.0, 5.0]


def test_an_exception_of_one_rank_is_raised_with_its_traceback() -> None:
    """Claim: the parent sees which rank raised, and what."""
    with GlooWorld(2) as world, pytest.raises(RankError, match=r"(?s)rank 1 of 2.*the last rank gives up"):
        world.run(fail_on_last)
