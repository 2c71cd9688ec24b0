"""Every weight of a discriminator by its name on disk and its name in Megatron.

On disk a discriminator has the names of its dense Qwen3-VL, except that layer i's MLP is
``model.language_model.layers.{i}.mlp.gate.weight`` (router, [experts, hidden]) and
``model.language_model.layers.{i}.mlp.experts.{e}.{gate,up,down}_proj.weight``, that there is no ``lm_head.weight``, and
that ``score.weight`` ([1, hidden]) is the scalar head, without a bias in every kind. Expert e belongs to tower
``e % num_towers``. Without towers the MLPs are those of the dense model.
"""

from __future__ import annotations

from math import prod

from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.mapping import (
    TEXT,
    attention_mappings,
    dense_mlp_mappings,
    embedding_mappings,
    expert_mappings,
    router_mapping,
    vision_mappings,
)
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
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


def expert_layout(towers: Towers | None) -> ExpertLayout | None:
    """The one layout that experts are stored in; None without towers."""
    return None if towers is None else EXPERT_LAYOUT


def weight_mappings(shape: Qwen3VLShape, towers: Towers | None) -> list[WeightMapping]:
    """All weights of a discriminator, each once."""
    mappings = [*vision_mappings(shape), *embedding_mappings(shape)]
    for layer in range(shape.text.num_layers):
        mappings += [*attention_mappings(shape, layer), *_mlp_mappings(shape, towers, layer)]
    mappings.append(WeightMapping((SCORE,), "score_head.weight", Replicated(), hf_shapes=((1, shape.text.hidden),)))
    return mappings


def _mlp_mappings(shape: Qwen3VLShape, towers: Towers | None, layer: int) -> list[WeightMapping]:
    if towers is None:
        return dense_mlp_mappings(shape, layer)
    return [
        router_mapping(shape.text.hidden, towers.num_experts, layer),
        *expert_mappings(shape.text.hidden, towers.experts(shape.text.ffn), layer, EXPERT_LAYOUT),
    ]


def count_parameters(shape: Qwen3VLShape, towers: Towers | None) -> tuple[int, int]:
    """How many weights a discriminator has, and how many of them are left without the experts that a token skips.

    Example: two towers of four experts, two per token, on the 2B preset have 9.5 and 3.2 billion.
    """
    shapes = [hf_shape for mapping in weight_mappings(shape, towers) for hf_shape in mapping.hf_shapes or ()]
    total = sum(map(prod, shapes))
    if towers is None:
        return total, total
    text = shape.text
    skipped = text.num_layers * (towers.num_experts - towers.top_k) * 3 * text.hidden * text.ffn
    return total, total - skipped
