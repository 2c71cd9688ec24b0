"""The oracle of the model tests: a tiny random Qwen3-VL of transformers, its logits and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.types import ImageInput, TokenSequence

IMAGE, VIDEO, START, END, PAD = 290, 291, 292, 293, 0


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
"""Added to the text config of a model with experts; neither the width nor its double is the hidden size."""


def tiny_config(
    *, taps: Sequence[int] = (0, 1), tied: bool = True, vocab: int = 300, experts: bool = False
) -> dict[str, Any]:
    """A config.json of 4 language layers, 8 heads in 4 groups, and 3 vision blocks of 4 x 4-pixel patches."""
    config = (Qwen3VLMoeConfig if experts else Qwen3VLConfig)(
        text_config={
            **(EXPERTS if experts else {}),
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "intermediate_size": 160,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
            "eos_token_id": 1,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "num_heads": 8,
            "intermediate_size": 96,
            "patch_size": 4,
            "out_hidden_size": 128,
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


def shape_of(config: Mapping[str, Any]) -> Qwen3VLShape:
    return Qwen3VLShape.from_dict(config)


def image(rng: np.random.Generator, grid: tuple[int, int, int]) -> ImageInput:
    pixels = rng.normal(size=(grid[0] * grid[1] * grid[2], 3 * 2 * 4 * 4)).astype(np.float32)
    return ImageInput(pixels, grid)


def row(rng: np.random.Generator, *parts: int | ImageInput) -> TokenSequence:
    """A row of random text (an int counts tokens) and images (each video frame between its own markers)."""
    ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(2, 280, size=part).tolist()
            continue
        images.append(part)
        frames, height, width = part.grid_thw
        pad = IMAGE if frames == 1 else VIDEO
        for _ in range(frames):
            ids += [START, *[pad] * (height * width // 4), END]
    return TokenSequence(tuple(ids), tuple(images))


def tiny_rows(case: str) -> list[TokenSequence]:
    """Rows of a named case: ``images``, ``shared`` (rows share an image), ``text`` (no image), ``video``."""
    rng = np.random.default_rng(7)
    small, wide, tall = (image(rng, grid) for grid in ((1, 4, 4), (1, 4, 8), (1, 6, 2)))
    if case == "images":
        return [row(rng, 3, small, 5, wide, 4), row(rng, 9), row(rng, tall, 6, small, 2)]
    if case == "shared":
        return [row(rng, 3, wide, 7), row(rng, 3, wide, 4), row(rng, 2, small, 3, wide, 1)]
    if case == "text":
        return [row(rng, 7), row(rng, 12)]
    if case == "video":
        return [row(rng, 3, image(rng, (3, 4, 6)), 4, small, 2), row(rng, 5)]
    raise ValueError(case)


def tiny_batch(case: str, *, multiple_of: int = 1, pack: bool = False) -> Batch:
    return collate(
        tiny_rows(case),
        pad_token_id=PAD,
        multiple_of=multiple_of,
        pack=pack,
        patch_dim=96,
        device=torch.device("cpu"),
    )


def real_tokens(batch: Batch) -> Tensor:
    """``[B, S]``: which positions are not padding."""
    return torch.arange(batch.input_ids_B_S.shape[1])[None] < batch.lengths_Q[:, None]


def probe(batch: Batch, vocab: int) -> Tensor:
    """Fixed random weights ``[B, S, V]``, zero on padding: the loss of the tests is their sum with the logits.

    A linear loss gives every logit its own gradient, so that no error can cancel out.
    """
    generator = torch.Generator().manual_seed(11)
    longest = int(batch.lengths_Q.max())
    weights = torch.randn(len(batch.lengths_Q), longest, vocab, generator=generator)
    padded = torch.zeros(len(batch.lengths_Q), batch.input_ids_B_S.shape[1], vocab)
    padded[:, :longest] = weights
    return padded * real_tokens(batch)[..., None]


@dataclass(frozen=True)
class Oracle:
    """What transformers makes of a batch: logits ``[B, S, V]`` and the gradients of the probe loss by name."""

    logits: Tensor
    gradients: dict[str, Tensor]


def transformers_oracle(config: Mapping[str, Any], case: str, *, seed: int = 0, model: Any = None) -> Oracle:
    """Logits and gradients of ``model`` (``tiny_model``); its vision tower runs once per row that shows an image."""
    model = model or tiny_model(config, seed=seed)
    rows, batch = tiny_rows(case), tiny_batch(case)
    kinds = {IMAGE: 1, VIDEO: 2}
    ids = batch.input_ids_B_S
    types = sum((ids == token).int() * kind for token, kind in kinds.items())
    inputs: dict[str, Tensor | None] = {}
    for name, pixels, is_video in (("image", "pixel_values", False), ("video", "pixel_values_videos", True)):
        shown = [one for r in rows for one in r.images if (one.grid_thw[0] > 1) == is_video]
        if shown:
            inputs[pixels] = torch.from_numpy(np.concatenate([one.pixel_values_P_D for one in shown]))
            inputs[f"{name}_grid_thw"] = torch.tensor([one.grid_thw for one in shown])
    logits = model(
        input_ids=ids, attention_mask=real_tokens(batch).long(), mm_token_type_ids=types, use_cache=False, **inputs
    ).logits
    (logits * probe(batch, logits.shape[-1])).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    return Oracle(logits.detach(), gradients)
