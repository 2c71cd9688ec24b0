"""The test kit itself: results come back per rank, layouts change on one set of processes, failures are told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.layout import place_of
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
    for parallel, num_ranks in ((ParallelConfig(tp=2, pp=2), 4), (ParallelConfig(tp=2), 4), (ParallelConfig(pp=2), 2)):
        expected = [place_of(rank, world_size=num_ranks, parallel=parallel) for rank in range(num_ranks)]
        found = gloo.run(place, num_ranks=num_ranks, parallel=parallel)
        assert found == [(rank, at.tp_rank, at.pp_rank, at.dp_rank) for rank, at in enumerate(expected)]


def test_collectives_run_in_the_groups_of_the_layout(gloo: GlooWorld) -> None:
    """Claim: a group holds the ranks of its model-parallel block only."""
    assert gloo.run(sum_of_ranks, parallel=ParallelConfig(tp=2)) == [1.0, 1.0, 5.0, 5.0]


def hang_unless_first(world: World) -> None:
    if world.rank:
        dist.barrier()


def test_an_exception_of_one_rank_is_raised_with_its_traceback(gloo: GlooWorld) -> None:
    """Claim: the parent sees which rank raised, and what; the next call works again."""
    with pytest.raises(RankError, match=r"(?s)rank 3 of 4.*the last rank gives up"):
        gloo.run(fail_on_last)
    assert len(gloo.run(place)) == 4


def test_a_hang_ends_in_a_timeout_and_leaves_no_process() -> None:
    """Claim: ranks that wait for one that never comes are given up on, and killed."""
    with GlooWorld(2, timeout_s=15.0) as world:
        world.run(place)
        processes = list(world._processes)
        world.timeout_s = 1.0
        with pytest.raises((TimeoutError, RankError)):
            world.run(hang_unless_first)
        assert not any(process.is_alive() for process in processes)
