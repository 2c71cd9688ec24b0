"""Every weight of a discriminator by its name on disk and its name in Megatron.

On disk a discriminator has the names of its dense Qwen3-VL, except that layer i's MLP is
``model.language_model.layers.{i}.mlp.gate.weight`` (router, [experts, hidden]) and
``model.language_model.layers.{i}.mlp.experts.{e}.{gate,up,down}_proj.weight``, that there is no ``lm_head.weight``, and
that ``score.weight`` ([1, hidden]) is the scalar head. Expert e belongs to tower ``e % num_towers``.
"""

from __future__ import annotations

from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.mapping import (
    TEXT,
    attention_mappings,
    embedding_mappings,
    expert_mappings,
    router_mapping,
    vision_mappings,
)
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import Replicated

SCORE = "score.weight"
EXPERT_LAYOUT: ExpertLayout = "per_expert"


def router_name(layer: int) -> str:
    """Name on disk of one layer's router."""
    return f"{TEXT}.layers.{layer}.mlp.gate.weight"


def dense_name(layer: int, part: str) -> str:
    """Name of the dense MLP projection that an expert starts from."""
    return f"{TEXT}.layers.{layer}.mlp.{part}_proj.weight"


def weight_mappings(shape: Qwen3VLShape, towers: Towers) -> list[WeightMapping]:
    """All weights of a discriminator, each once."""
    experts = towers.experts(shape.text.ffn)
    mappings = [*vision_mappings(shape), *embedding_mappings(shape)]
    for layer in range(shape.text.num_layers):
        mappings += [
            *attention_mappings(shape, layer),
            router_mapping(shape.text.hidden, towers.num_experts, layer),
            *expert_mappings(shape.text.hidden, experts, layer, EXPERT_LAYOUT),
        ]
    mappings.append(WeightMapping((SCORE,), "score_head.weight", Replicated(), hf_shapes=((1, shape.text.hidden),)))
    return mappings
