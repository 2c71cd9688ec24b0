"""The published sizes of Qwen3-VL, for building one without its folder.

The numbers are those of the ``config.json`` files of Qwen/Qwen3-VL-{2B,4B,8B,32B,30B-A3B,235B-A22B}-Instruct.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prism_megatron.config.architecture.qwen3_vl import (
    TEXT_ACTIVATION,
    VISION_ACTIVATION,
    Qwen3VLShape,
    TextShape,
    VisionShape,
)
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class _Size:
    """What differs between the sizes: language tower, experts (none in a dense model), kind of vision tower."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    large_vision: bool
    tied: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0


_SIZES = {
    "2B": _Size(28, 2048, 6144, heads=16, kv_heads=8, large_vision=False, tied=True),
    "4B": _Size(36, 2560, 9728, heads=32, kv_heads=8, large_vision=False, tied=True),
    "8B": _Size(36, 4096, 12288, heads=32, kv_heads=8, large_vision=True),
    "32B": _Size(64, 5120, 25600, heads=64, kv_heads=8, large_vision=True),
    "30B-A3B": _Size(
        48, 2048, 6144, 32, 4, large_vision=True, num_experts=128, experts_per_token=8, expert_ffn=768
    ),
    "235B-A22B": _Size(
        94, 4096, 12288, 64, 4, large_vision=True, num_experts=128, experts_per_token=8, expert_ffn=1536
    ),
}  # fmt: skip

PRESETS = tuple(_SIZES)
"""Names that ``preset`` takes."""


def preset(name: str) -> Qwen3VLShape:
    """The shape of a published model by its size (``PRESETS``). Raises ConfigError for another name."""
    if name not in _SIZES:
        raise ConfigError(f"there is no Qwen3-VL {name!r}; choose one of {', '.join(PRESETS)}")
    size = _SIZES[name]
    return Qwen3VLShape(
        text=_text(size),
        vision=_vision(size),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        eos_token_id=151645,
        pad_token_id=151643,
        dtype="bfloat16",
    )


def _text(size: _Size) -> TextShape:
    return TextShape(
        num_layers=size.layers,
        hidden=size.hidden,
        ffn=size.ffn,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=128,
        vocab=151936,
        eps=1e-6,
        theta=5e6,
        mrope_section=(24, 20, 20),
        tied=size.tied,
        num_experts=size.num_experts,
        experts_per_token=size.experts_per_token,
        expert_ffn=size.expert_ffn,
    )


def _vision(size: _Size) -> VisionShape:
    large = size.large_vision
    return VisionShape(
        depth=27 if large else 24,
        hidden=1152 if large else 1024,
        heads=16,
        ffn=4304 if large else 4096,
        patch=16,
        temporal_patch=2,
        channels=3,
        merge=2,
        num_position_embeddings=2304,
        out_hidden=size.hidden,
        taps=(8, 16, 24) if large else (5, 11, 17),
    )


def hf_config(shape: Qwen3VLShape) -> dict[str, Any]:
    """A ``config.json`` of ``shape``, in the hub's spelling: ``Qwen3VLShape.from_dict`` of it gives ``shape`` again."""
    text, vision = shape.text, shape.vision
    kind = "qwen3_vl_moe" if text.experts else "qwen3_vl"
    experts = {
        "num_experts": text.num_experts,
        "num_experts_per_tok": text.experts_per_token,
        "moe_intermediate_size": text.expert_ffn,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration" if text.experts else "Qwen3VLForConditionalGeneration"],
        "model_type": kind,
        "dtype": shape.dtype,
        "tie_word_embeddings": text.tied,
        "image_token_id": shape.image_token_id,
        "video_token_id": shape.video_token_id,
        "vision_start_token_id": shape.vision_start_token_id,
        "vision_end_token_id": shape.vision_end_token_id,
        "text_config": {
            "model_type": f"{kind}_text",
            "attention_bias": False,
            "eos_token_id": shape.eos_token_id,
            "pad_token_id": shape.pad_token_id,
            "head_dim": text.head_dim,
            "hidden_act": TEXT_ACTIVATION,
            "hidden_size": text.hidden,
            "intermediate_size": text.ffn,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.num_layers,
            "num_key_value_heads": text.kv_heads,
            "rms_norm_eps": text.eps,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": list(text.mrope_section),
                "rope_type": "default",
            },
            "rope_theta": text.theta,
            "vocab_size": text.vocab,
            **(experts if text.experts else {}),
        },
        "vision_config": {
            "model_type": kind,
            "deepstack_visual_indexes": list(vision.taps),
            "depth": vision.depth,
            "hidden_act": VISION_ACTIVATION,
            "hidden_size": vision.hidden,
            "in_channels": vision.channels,
            "intermediate_size": vision.ffn,
            "num_heads": vision.heads,
            "num_position_embeddings": vision.num_position_embeddings,
            "out_hidden_size": vision.out_hidden,
            "patch_size": vision.patch,
            "spatial_merge_size": vision.merge,
            "temporal_patch_size": vision.temporal_patch,
        },
    }
