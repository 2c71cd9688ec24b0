"""Tiny random Qwen3-VLs, saved as Hugging Face folders, and what transformers makes of them.

Sizes are odd wherever the format allows it: a vocabulary and an ffn width that few divide, heads whose sizes do not add
up to the hidden size, patches of 4 x 4 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.utils import logging

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.parity.matrix import outcome_path
from prism_megatron.parity.oracle import load_transformers, transformers_outcome
from prism_megatron.parity.samples import END, IMAGE, PAD, PATCH, START, VIDEO, sample_sets

MODELS: Mapping[str, Mapping[str, Any]] = {
    # All of the first three layers take a tap; no tp divides the vocabularies.
    "dense tied": {"taps": (0, 1, 2), "tied": True, "vocab": 301},
    "dense untied": {"taps": (0, 1, 2), "tied": False, "vocab": 303},
    "MoE": {"taps": (0, 1, 2), "tied": False, "vocab": 301, "num_experts": 8},
}


def tiny_config(
    *,
    taps: Sequence[int] = (0, 1),
    tied: bool = True,
    vocab: int = 300,
    num_experts: int = 0,
    hidden: int = 120,
    ffn: int = 152,
    expert_ffn: int = 40,
) -> dict[str, Any]:
    """A config.json of 4 language layers, 8 heads in 4 groups, and 3 vision blocks; with experts in every layer, or
    none."""
    text: dict[str, Any] = {
        "num_hidden_layers": 4,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
        "eos_token_id": 1,
        "pad_token_id": PAD,
    }
    if num_experts:
        text |= {"num_experts": num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": expert_ffn}
    config = (Qwen3VLMoeConfig if num_experts else Qwen3VLConfig)(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "num_heads": 8,
            "intermediate_size": 104,
            "patch_size": PATCH,
            "out_hidden_size": hidden,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": list(taps),
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    return dict(config.to_dict())


def tiny_model(config: Mapping[str, Any], *, seed: int = 0) -> Any:
    """Random weights, large enough that every part of the model shows in the logits; norms and biases included."""
    torch.manual_seed(seed)
    model: Any
    if config["model_type"] == "qwen3_vl_moe":
        model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig.from_dict(dict(config)))
    else:
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(dict(config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
    model.set_attn_implementation("sdpa")
    return model.eval()


def prepare(model: str, folder: Path) -> Qwen3VLShape:
    """Save the named model in ``folder``, with its outcome of every sample set in fp32 and bf16 beside it."""
    logging.disable_progress_bar()
    tiny_model(tiny_config(**MODELS[model])).save_pretrained(folder)
    shape = Qwen3VLShape.from_folder(folder)
    for dtype in (torch.float32, torch.bfloat16):
        oracle = load_transformers(folder, shape, dtype=dtype, device=torch.device("cpu"))
        for name, samples in sample_sets().items():
            outcome = transformers_outcome(oracle, samples, shape)
            torch.save((outcome.logits, outcome.gradients), outcome_path(folder, name, dtype))
    return shape
