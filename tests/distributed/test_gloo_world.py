"""The test kit itself: results come back per rank, layouts change on one set of processes, failures are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import gather_objects, max_numbers, sum_numbers
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


def reduced(world: World) -> tuple[dict[str, float], dict[str, float]]:
    """Of numbers that every second rank names in another order."""
    numbers = {"tokens": 2.0**24 + world.rank, "rank": float(world.rank)}
    if world.rank % 2:
        numbers = dict(reversed(numbers.items()))
    arguments = {"device": world.device, "group": world.groups.tp}
    return sum_numbers(numbers, **arguments), max_numbers(numbers, **arguments)


def test_numbers_meet_by_name_in_float64(gloo: GlooWorld) -> None:
    """Claim: sums and maxima are those of a name on the ranks of the group, and exact where float32 is not."""
    results = gloo.run(reduced, parallel=ParallelConfig(tp=2))
    for rank, (sums, maxima) in enumerate(results):
        first = rank // 2 * 2
        assert sums == {"tokens": 2.0**25 + 2 * first + 1, "rank": 2 * first + 1}
        assert maxima == {"tokens": 2.0**24 + first + 1, "rank": first + 1}


def gathered(world: World) -> list[int] | None:
    return gather_objects(world.rank, group=world.groups.tp)


def test_objects_are_gathered_on_the_first_rank_of_a_group(gloo: GlooWorld) -> None:
    """Claim: every group's own first rank gets them, in the group's order, and no other rank does."""
    assert gloo.run(gathered, parallel=ParallelConfig(tp=2)) == [[0, 1], None, [2, 3], None]


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


def wait_for_ever(_world: World) -> None:
    threading.Event().wait()


def test_a_timeout_says_where_the_ranks_are() -> None:
    """Claim: the error has every rank's stack. (On a busy machine a rank may not be further than its start.)"""
    with GlooWorld(2, timeout_s=15.0) as world:
        world.run(place)
        world.timeout_s = 2.0
        with pytest.raises(
            TimeoutError, match=r"(?s)rank 0: .*most recent call first.*rank 1: .*most recent call first"
        ):
            world.run(wait_for_ever)
