"""The expert layer of a discriminator: Megatron's MoE layer with routing inputs as arguments."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import Tensor

from model_providers.moe_discriminator.routing import TowerRouter
from model_providers.moe_discriminator.towers import Towers


class TowerMoELayer(MoELayer):
    """Route, dispatch, compute, combine. Which tower a row belongs to is an argument, never remembered."""

    def forward(
        self,
        hidden_S_B_H: Tensor,
        tower_ids_B: Tensor,
        lengths_B: Tensor,
        tokens_S: Tensor,
        balance_weights_B: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """``hidden [S_local, B, H]``, of the tokens ``tokens_S`` of each row, through experts of its tower."""
        gates_T_E, map_T_E = self.router(hidden_S_B_H, tower_ids_B, lengths_B, tokens_S, balance_weights_B)
        tokens, gates = self.preprocess(hidden_S_B_H, gates_T_E, map_T_E)
        tokens, gates = self.dispatch(tokens, gates)
        output, _ = self.routed_experts_compute(tokens, gates)
        return self.postprocess(self.combine(output), None), None


def tower_mlp(towers: Towers, groups: ProcessGroupCollection) -> type[TowerMoELayer]:
    """A ``TowerMoELayer`` with one MLP after another as experts, bound to its towers and groups.

    A class and not a ModuleSpec: 0.16 gives its groups only to specs of Megatron's own MoE classes and warns about
    every other spec; 0.19 calls whatever it gets.
    """
    experts = ModuleSpec(
        module=SequentialMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    parts = MoESubmodules(experts=experts, router=functools.partial(TowerRouter, towers=towers))

    class BoundTowerMoELayer(TowerMoELayer):
        def __init__(self, config: TransformerConfig, **_passed_by_0_19: Any) -> None:
            super().__init__(config, parts, pg_collection=groups)

    return BoundTowerMoELayer
