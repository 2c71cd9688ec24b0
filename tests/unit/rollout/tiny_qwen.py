"""A three-layer Qwen3-VL, dense or with experts, random weights, prompts for it, and a finder that judges nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from prism_megatron.types import ImageInput, Prompt, Segments

VOCAB = 96
END, IMAGE, VIDEO = 90, 92, 93
PATCH_DIM = 3 * 2 * 16 * 16
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
"""Settings of ``tiny_config`` for a model with experts in every layer."""


class GoOn:
    """Never ends a response."""

    def add(self, token_id: int) -> bool:
        del token_id
        return False


class NoSegments:
    """Every response is invalid, which is all these tests need."""

    def find(self, token_ids: Sequence[int]) -> Segments:
        return Segments(None, None, f"{len(token_ids)} tokens")

    def watch(self) -> GoOn:
        return GoOn()


def tiny_config(**text: Any) -> Any:
    return (Qwen3VLMoeConfig if "num_experts" in text else Qwen3VLConfig)(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "tie_word_embeddings": True,
            "eos_token_id": END,
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=91,
        vision_end_token_id=94,
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )


def tiny_model(folder: Path, seed: int = 0, **text: Any) -> Any:
    """A model whose config is saved in ``folder``. Weights are wide enough that tokens differ in probability."""
    torch.manual_seed(seed)
    model_class: Any = Qwen3VLMoeForConditionalGeneration if "num_experts" in text else Qwen3VLForConditionalGeneration
    model = model_class(tiny_config(**text)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.config.save_pretrained(folder)
    return model


def image(seed: int, height: int = 4, width: int = 4) -> ImageInput:
    pixels = np.random.default_rng(seed).standard_normal((height * width, PATCH_DIM), dtype=np.float32)
    return ImageInput(pixels, (1, height, width))


def prompt(seed: int, *grids: tuple[int, int], words: int = 5) -> Prompt:
    """``words`` text tokens, one image per (height, width) of patches, and ``words`` text tokens."""
    text = np.random.default_rng(seed).integers(0, END, size=2 * words).tolist()
    pads = [token for height, width in grids for token in (91, *[IMAGE] * (height * width // 4), 94)]
    ids = (*text[:words], *pads, *text[words:])
    return Prompt(f"p{seed}", ids, tuple(image(seed + i, *grid) for i, grid in enumerate(grids)), "?")


def unequal_prompts() -> list[Prompt]:
    """Text only, one image, two images of different sizes; lengths differ."""
    return [prompt(1), prompt(2, (4, 4)), prompt(3, (4, 8), (6, 4), words=3), prompt(4, (4, 4), words=9)]
