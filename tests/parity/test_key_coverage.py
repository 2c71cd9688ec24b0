"""Claim: of each of the six published models the mapping names every tensor exactly once, in its shape.

Oracle: the state dict of transformers' model, built on the meta device from the preset's sizes (and, where the shared
folder is, from the published config), and a list of names written out by hand. Blind spot: what published folders
hold beside what transformers makes of their configs.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from model_providers.qwen3_vl.mapping import LM_HEAD, weight_mappings
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.presets import PRESETS, preset
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import Op

NUM_NAMES = {"2B": 625, "4B": 713, "8B": 750, "32B": 1058, "30B-A3B": 882, "235B-A22B": 1388}
"""Tensors of each model in transformers' layout, a tied ``lm_head.weight`` left out."""

LAYER, BLOCK = "model.language_model.layers.*", "model.visual.blocks.*"
TAP, LAST = "model.visual.deepstack_merger_list.*", "model.visual.merger"
MERGER = ["linear_fc1.bias", "linear_fc1.weight", "linear_fc2.bias", "linear_fc2.weight", "norm.bias", "norm.weight"]
ONCE = [
    "model.language_model.embed_tokens.weight",
    "model.language_model.norm.weight",
    "model.visual.patch_embed.proj.bias",
    "model.visual.patch_embed.proj.weight",
    "model.visual.pos_embed.weight",
    *(f"{LAST}.{name}" for name in MERGER),
]
PER_LAYER = [
    f"{LAYER}.input_layernorm.weight",
    f"{LAYER}.post_attention_layernorm.weight",
    *(f"{LAYER}.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
]
PER_BLOCK = [
    f"{BLOCK}.{module}.{kind}"
    for module in ("attn.proj", "attn.qkv", "mlp.linear_fc1", "mlp.linear_fc2", "norm1", "norm2")
    for kind in ("bias", "weight")
]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DENSE = [f"{LAYER}.mlp.{name}.weight" for name in PROJECTIONS]
ROUTER = [f"{LAYER}.mlp.gate.weight"]
FUSED = [f"{LAYER}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
SINGLE = [f"{LAYER}.mlp.experts.*.{name}.weight" for name in PROJECTIONS]


def transformers_config(shape: Qwen3VLShape) -> dict[str, Any]:
    """The ``config.json`` of a model of these sizes."""
    text, vision = shape.text, shape.vision
    return {
        "tie_word_embeddings": text.tied,
        "text_config": {
            "num_hidden_layers": text.num_layers,
            "hidden_size": text.hidden,
            "intermediate_size": text.ffn,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "vocab_size": text.vocab,
            "num_experts": text.num_experts,
            "num_experts_per_tok": text.experts_per_token,
            "moe_intermediate_size": text.expert_ffn,
        },
        "vision_config": {
            "depth": vision.depth,
            "hidden_size": vision.hidden,
            "num_heads": vision.heads,
            "intermediate_size": vision.ffn,
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "in_channels": vision.channels,
            "spatial_merge_size": vision.merge,
            "num_position_embeddings": vision.num_position_embeddings,
            "out_hidden_size": vision.out_hidden,
            "deepstack_visual_indexes": list(vision.taps),
        },
    }


def state_of(config: dict[str, Any], *, sparse: bool) -> dict[str, Tensor]:
    """The state dict that transformers makes, without memory for it."""
    made: Any = Qwen3VLMoeConfig(**config) if sparse else Qwen3VLConfig(**config)
    kind: Any = Qwen3VLMoeForConditionalGeneration if sparse else Qwen3VLForConditionalGeneration
    with torch.device("meta"):
        state: dict[str, Tensor] = kind._from_config(made).state_dict()
    return state


def claimed(mappings: list[WeightMapping]) -> dict[str, tuple[int, ...]]:
    """Every name with its shape. A tensor, or an entry of one that fuses experts, is claimed once."""
    shapes: dict[str, tuple[int, ...]] = {}
    claims: dict[str, list[int | None]] = {}
    for mapping in mappings:
        for name, shape in zip(mapping.hf_names, mapping.hf_shapes or (), strict=True):
            assert shapes.setdefault(name, shape) == shape
            claims.setdefault(name, []).append(mapping.expert)
    for name, experts in claims.items():
        assert experts == ([None] if experts[0] is None else list(range(shapes[name][0]))), name
    parameters = [mapping.parameter for mapping in mappings]
    assert len(parameters) == len(set(parameters))
    return shapes


@functools.cache
def numbers_made(op: Op, shapes: tuple[tuple[int, ...], ...]) -> int:
    """Numbers of the parameter that tensors of these shapes make."""
    return op.split([torch.empty(shape, device="meta") for shape in shapes], 1)[0].numel()


def check_against(state: dict[str, Tensor], shape: Qwen3VLShape) -> None:
    mappings = weight_mappings(shape)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    aliases = {mapping.optional_alias: mapping.hf_names[0] for mapping in mappings if mapping.optional_alias}
    assert aliases == ({LM_HEAD: "model.language_model.embed_tokens.weight"} if shape.text.tied else {})
    for alias, name in aliases.items():
        assert expected.pop(alias) == expected[name]
    assert claimed(mappings) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_of_a_preset_is_mapped_once(name: str) -> None:
    """Claim: names and shapes are transformers', and parameters hold as many numbers as the tensors they come from."""
    shape = preset(name)
    state = state_of(transformers_config(shape), sparse=shape.text.num_experts > 0)
    check_against(state, shape)
    numbers = 0
    for mapping in weight_mappings(shape):
        held = mapping.hf_shapes or ()
        numbers += numbers_made(mapping.op, held if mapping.expert is None else tuple(one[1:] for one in held))
    assert numbers == sum(tensor.numel() for held, tensor in state.items() if held != LM_HEAD or not shape.text.tied)


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_of_a_published_config_is_mapped_once(name: str, shared_dir: Path) -> None:
    config = json.loads((shared_dir / "qwen3_vl" / "configs" / f"{name}.json").read_text())
    shape = Qwen3VLShape.from_dict(config)
    check_against(state_of(config, sparse=shape.text.num_experts > 0), shape)


@pytest.mark.parametrize("layout", get_args(ExpertLayout))
@pytest.mark.parametrize("name", PRESETS)
def test_the_names_of_each_size(name: str, layout: ExpertLayout) -> None:
    """Claim: the names that we read and write are those listed above, that many of each, in all layouts of experts."""
    shape = preset(name)
    layers, experts, taps = shape.text.num_layers, shape.text.num_experts, len(shape.vision.taps)
    expected = Counter(dict.fromkeys(ONCE, 1))
    expected |= Counter(dict.fromkeys(PER_LAYER, layers))
    expected |= Counter(dict.fromkeys(PER_BLOCK, shape.vision.depth))
    expected |= Counter({f"{TAP}.{part}": taps for part in MERGER})
    if not shape.text.tied:
        expected[LM_HEAD] = 1
    if not experts:
        expected |= Counter(dict.fromkeys(DENSE, layers))
    elif layout == "per_expert":
        expected |= Counter(dict.fromkeys(ROUTER, layers)) | Counter(dict.fromkeys(SINGLE, layers * experts))
    else:
        expected |= Counter(dict.fromkeys(ROUTER + FUSED, layers))
    names = claimed(weight_mappings(shape, layout))
    assert Counter(re.sub(r"\.\d+(?=\.)", ".*", held) for held in names) == expected
    if layout != "per_expert":
        assert len(names) == NUM_NAMES[name]
