"""The order in which groups are used for the first time, which NCCL cares about and gloo does not.

Ranks run whole steps with groups that block as NCCL's do (``tests/lazy_groups.py``). A rank that uses one group first
while another of its members uses a second one first would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from prism_megatron.config.engine.experts import RouterLosses
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld, RankError
from tests.distributed import test_policy_experts, tiny
from tests.integration import game_ranks
from tests.lazy_groups import lazy_collectives

Used = dict[str, list[int]]


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(8) as world:
        yield world


def _used_in_training(world: World, experts: bool) -> Used:
    with lazy_collectives() as used:
        if experts:
            test_policy_experts.step(world, RouterLosses(balance=3.0, z=0.5), 2, 0, False)
        else:
            engine = tiny.build(world)
            tiny.train(engine, range(2))
            tiny.exported(engine)
    return used


@pytest.mark.parametrize(
    ("ranks", "parallel", "experts"),
    [
        (8, ParallelConfig(tp=2, pp=2), False),
        (4, ParallelConfig(pp=4), False),
        (4, ParallelConfig(pp=2, vpp=2), False),
        (4, ParallelConfig(tp=2, cp=2), True),
        (4, ParallelConfig(ep=2, pp=2), True),
    ],
    ids=["TP2-PP2-DP2", "PP4", "PP2-VPP2-DP2", "TP2-CP2 experts", "DP2-EP2-PP2 experts"],
)
def test_training_and_export_use_no_group_out_of_turn(
    gloo: GlooWorld, ranks: int, parallel: ParallelConfig, experts: bool
) -> None:
    """Claim: steps end, and without experts an export; every group that is used was used by all of its members."""
    by_rank = gloo.run(_used_in_training, experts, num_ranks=ranks, parallel=parallel)
    names = {name: members for used in by_rank for name, members in used.items()}
    assert len(names) > 2
    for name, members in names.items():
        assert [rank for rank, used in enumerate(by_rank) if name in used] == members


def _used_in_the_game(world: World) -> Used:
    with lazy_collectives() as used:
        stage = game_ranks.build(world, GameConfig(), "vv", {}, exam_prompts=2)
        stage.prepare(0)
        for step in range(2):
            stage.play(step)
        stage.close()
    return used


def test_two_players_use_no_group_out_of_turn(gloo: GlooWorld) -> None:
    """Claim: steps of alignment end too, with their hand-overs and their held-out prompts."""
    by_rank = gloo.run(_used_in_the_game, num_ranks=4, parallel=ParallelConfig(tp=2, pp=2))
    assert all(len(used) > 2 for used in by_rank)


def _crossed(world: World) -> list[float]:
    """Two groups of the same ranks, used in opposite orders, as gloo lets asynchronous collectives be."""
    one, two = dist.new_group([0, 1]), dist.new_group([0, 1])
    groups = [one, two] if world.rank == 0 else [two, one]
    values = [torch.ones(1), torch.ones(1)]
    with lazy_collectives(seconds=2.0):
        work = [dist.all_reduce(value, group=group, async_op=True) for value, group in zip(values, groups, strict=True)]
        for each in work:
            assert each is not None
            each.wait()
    return [value.item() for value in values]


def test_what_nccl_would_never_end_is_an_error_here() -> None:
    """Claim: the double notices groups that are used in another order on another rank."""
    with GlooWorld(2) as gloo, pytest.raises(RankError, match="waits for ever"):
        gloo.run(_crossed)
