"""Which experts were chosen, against counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model_providers.moe_discriminator.expert_load import expert_load, take_loads
from model_providers.moe_discriminator.routing import TowerRouter
from model_providers.moe_discriminator.towers import Towers
from prism_megatron.engine.runtime import World
from tests.distributed import checkpoint_ranks, tiny

TWO, POOL = Towers(num_towers=2, experts_per_tower=2, top_k=1), Towers(num_towers=1, experts_per_tower=4, top_k=2)


def entropy(*shares: float) -> float:
    return -sum(p * math.log(p) for p in shares if p)


def test_shares_and_entropy_are_those_of_the_segments_tower() -> None:
    """Claim: layers with many tokens weigh more in the shares, and all layers alike in the entropy."""
    # Perception's experts are 0 and 2, reasoning's 1 and 3.
    loads = torch.tensor([[[1, 0, 3, 0], [0, 5, 0, 5]], [[6, 0, 0, 0], [0, 2, 0, 8]]]).double()
    assert expert_load(loads, TWO) == pytest.approx(
        {
            "perception/expert_load/0": 7 / 10,
            "perception/expert_load/1": 3 / 10,
            "perception/expert_entropy": entropy(1 / 4, 3 / 4) / math.log(2) / 2,
            "reasoning/expert_load/0": 7 / 20,
            "reasoning/expert_load/1": 13 / 20,
            "reasoning/expert_entropy": (1 + entropy(1 / 5, 4 / 5) / math.log(2)) / 2,
        }
    )


def test_a_pool_is_shared_by_both_segments_and_silence_has_no_numbers() -> None:
    """Claim: with one pool a segment's shares are over all experts; a segment without tokens is left out."""
    loads = torch.tensor([[[0, 0, 0, 0], [4, 2, 2, 0]]]).double()
    assert expert_load(loads, POOL) == pytest.approx(
        {
            "reasoning/expert_load/0": 0.5,
            "reasoning/expert_load/1": 0.25,
            "reasoning/expert_load/2": 0.25,
            "reasoning/expert_load/3": 0.0,
            "reasoning/expert_entropy": entropy(0.5, 0.25, 0.25) / math.log(4),
        }
    )


def test_every_routers_load_stands_at_its_layer(world: World) -> None:
    """Claim: each layer counts every real token's choices in its own place, once: what was taken is forgotten."""
    engine = checkpoint_ranks.build(world, "discriminator")
    towers, num_layers = checkpoint_ranks.TOWERS, tiny.provider().shape.text.num_layers
    routers = [part for part in engine.modules[0].modules() if isinstance(part, TowerRouter)]
    lengths, tower_ids = torch.tensor([3, 2]), torch.tensor([[0, 1]] * 4)
    sequence = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 2]])  # 2 is padding
    chosen: dict[int, Tensor] = {}
    for router in routers:
        _, map_T_E = router(torch.randn(4, 2, 64), tower_ids, sequence, lengths)
        assert router.layer_number is not None
        chosen[router.layer_number] = map_T_E.view(4, 2, -1)
    loads = take_loads(engine.modules, num_layers, towers)
    assert sorted(chosen) == [1, 2, 3, 4]
    for number, map_S_B_E in chosen.items():
        for segment in (0, 1):
            expected = map_S_B_E[sequence == segment].sum(0)
            assert loads[number - 1, segment].tolist() == expected.tolist(), (number, segment)
    assert not take_loads(engine.modules, num_layers, towers).any()
