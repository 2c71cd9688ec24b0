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
    router_mapping,
    vision_mappings,
)
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import GateUp, Replicated, Row

SCORE = "score.weight"


def router_name(layer: int) -> str:
    """Name on disk of one layer's router."""
    return f"{TEXT}.layers.{layer}.mlp.gate.weight"


def expert_name(layer: int, expert: int, part: str) -> str:
    """Name on disk of one expert's projection; ``part`` is gate, up or down."""
    return f"{TEXT}.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def dense_name(layer: int, part: str) -> str:
    """Name of the dense MLP projection that an expert starts from."""
    return f"{TEXT}.layers.{layer}.mlp.{part}_proj.weight"


def weight_mappings(shape: Qwen3VLShape, towers: Towers) -> list[WeightMapping]:
    """All weights of a discriminator, each once."""
    mappings = [*vision_mappings(shape), *embedding_mappings(shape)]
    for layer in range(shape.text.num_layers):
        mappings += [*attention_mappings(shape, layer), *expert_mappings(shape, towers, layer)]
    mappings.append(WeightMapping((SCORE,), "score_head.weight", Replicated(), hf_shapes=((1, shape.text.hidden),)))
    return mappings


def expert_mappings(shape: Qwen3VLShape, towers: Towers, layer: int) -> list[WeightMapping]:
    """The router and the experts of one decoder layer."""
    hidden, ffn = shape.text.hidden, shape.text.ffn
    ours = f"decoder.layers.{layer}.mlp"
    mappings = [router_mapping(hidden, towers.num_experts, layer)]
    for expert in range(towers.num_experts):
        linears = f"{ours}.experts.local_experts.{expert}"
        mappings += [
            WeightMapping(
                (expert_name(layer, expert, "gate"), expert_name(layer, expert, "up")),
                f"{linears}.linear_fc1.weight",
                GateUp(),
                hf_shapes=((ffn, hidden), (ffn, hidden)),
            ),
            WeightMapping(
                (expert_name(layer, expert, "down"),),
                f"{linears}.linear_fc2.weight",
                Row(),
                hf_shapes=((hidden, ffn),),
            ),
        ]
    return mappings
