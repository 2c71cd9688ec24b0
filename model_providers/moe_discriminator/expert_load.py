"""Which experts the tokens of a pass chose.

Shape suffixes: L layers of the whole model, K segments (``config.discriminator.SEGMENTS``), E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from megatron.core.transformer import MegatronModule
from torch import Tensor

from model_providers.moe_discriminator.routing import TowerRouter
from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.stages.discriminator import SEGMENTS


def take_loads(modules: Sequence[MegatronModule], num_layers: int, towers: Towers) -> Tensor:
    """``[L, K, E]`` float64: how often this rank's real tokens chose each expert since the last call.

    Layers of other stages are 0. A layer that is recomputed counts its tokens twice, as all others then do.
    """
    routers = [router for chunk in modules for router in chunk.modules() if isinstance(router, TowerRouter)]
    device = next(modules[0].parameters()).device
    loads_L_K_E = torch.zeros(num_layers, len(SEGMENTS), towers.num_experts, dtype=torch.float64, device=device)
    for router in routers:
        assert router.layer_number is not None, "Megatron numbers every layer, from 1"
        loads_L_K_E[router.layer_number - 1] = router.take_load()
    return loads_L_K_E


def expert_load(loads_L_K_E: Tensor, towers: Towers) -> Mapping[str, float]:
    """``{segment}/expert_load/{e}``, the share of a segment's choices that fell on expert e of its tower (all layers),
    and ``{segment}/expert_entropy``, the mean over layers of the shares' entropy: 1 is even, 0 a single expert.

    A segment without tokens has no numbers, and towers of one expert have no entropy.
    """
    metrics: dict[str, float] = {}
    for segment, name in enumerate(SEGMENTS):
        loads_L_E = loads_L_K_E[:, segment, segment % towers.num_towers :: towers.num_towers]
        if not loads_L_E.sum():
            continue
        shares_E = loads_L_E.sum(dim=0) / loads_L_E.sum()
        metrics |= {f"{name}/expert_load/{expert}": share for expert, share in enumerate(shares_E.tolist())}
        if towers.experts_per_tower > 1:
            shares_L_E = loads_L_E / loads_L_E.sum(dim=-1, keepdim=True)
            entropy_L = torch.special.entr(shares_L_E).sum(dim=-1) / math.log(towers.experts_per_tower)
            metrics[f"{name}/expert_entropy"] = float(entropy_L.mean())
    return metrics
