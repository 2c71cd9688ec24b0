"""Objects travel over gloo groups of their own: no group that carries tensors is used for them.

Every group is watched (``tests/lazy_groups.py``). Blind to NCCL itself, which no machine of CI has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import (
    all_gather_objects,
    barrier,
    broadcast_object,
    gather_objects,
    on_main,
)
from prism_megatron.parallel.object_groups import object_group
from prism_megatron.testing import GlooWorld
from tests.lazy_groups import lazy_collectives


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as gloo:
        yield gloo


def talk(world: World) -> tuple[list[object], set[str], set[str], set[str]]:
    """What comes of each call, and names of groups: used ones, those of objects, and those of tensors."""
    mine = world.groups.pp, world.groups.dp
    with lazy_collectives() as used:
        said: list[object] = [
            all_gather_objects(world.rank),
            *(all_gather_objects(world.rank, group=group) for group in mine),
            gather_objects({"rank": world.rank}),
            broadcast_object(world.rank, source=2),
            *(broadcast_object(world.rank, source=1, group=group) for group in mine),
            on_main(lambda: f"main is {world.rank}"),
        ]
        barrier()
    world_group: Any = dist.group.WORLD
    of_objects = {str(object_group(group).group_name) for group in (None, *mine)}
    of_tensors = {str(group.group_name) for group in (world_group, *mine)}
    return said, set(used), of_objects, of_tensors


def test_objects_use_groups_of_their_own(gloo: GlooWorld) -> None:
    """At PP2·DP2: ranks 0 and 1 are one pipeline stage, 0 and 2 one pipeline."""
    for rank, (said, used, of_objects, of_tensors) in enumerate(gloo.run(talk, parallel=ParallelConfig(pp=2))):
        pipeline, stage = [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]
        gathered = [{"rank": one} for one in range(4)] if rank == 0 else None
        assert said == [[0, 1, 2, 3], pipeline, stage, gathered, 2, pipeline[1], stage[1], "main is 0"]
        assert used == of_objects and len(of_objects) == 3
        assert not of_objects & of_tensors


def share(world: World) -> tuple[bool, bool]:
    """Whether the pipeline's objects go with the world's, where they are the same ranks; and a lone rank's nowhere."""
    return object_group(world.groups.pp) is object_group(None), object_group(world.groups.dp) is world.groups.dp


def test_groups_of_the_same_ranks_share_one(gloo: GlooWorld) -> None:
    assert gloo.run(share, parallel=ParallelConfig(pp=4)) == [(True, True)] * 4


def names(_world: World) -> set[str]:
    return {object_group(None).group_name}


def test_a_new_world_has_new_ones(gloo: GlooWorld) -> None:
    """Claim: they are closed with their world, and the next one has its own; twice in one process."""
    first, second = gloo.run(names), gloo.run(names, num_ranks=2)
    assert len(first) == 4 and len(second) == 2
    assert gloo.run(talk, parallel=ParallelConfig(pp=2))[0][0][0] == [0, 1, 2, 3]
