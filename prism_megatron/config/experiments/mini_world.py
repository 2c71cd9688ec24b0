"""The mini worlds: the shape of their tiny Qwen3-VL and the recipes that make their three checkpoints.

Rates, batch sizes and step counts were tried on two CPU cores; a systematic sloppy teacher is needed because zero-mean
label noise is invisible to greedy decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.fields import NOT_NEGATIVE

MINI_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "mini"
"""The shipped weights of the first world: ``base/``, ``policy/``, ``discriminator/`` and ``aligned/``."""


def mini_folder(world: MiniWorld) -> Path:
    """The shipped weights of a world, made by ``tools/make_mini.py --world``."""
    return MINI_FOLDER if world == "habits" else MINI_FOLDER / world


def mini_model_config(*, vocab_size: int, token_ids: dict[str, int]) -> dict[str, Any]:
    """The mini's Hugging Face ``config.json``. ``token_ids`` maps Qwen's special tokens to the mini tokenizer's ids.

    Eight heads over four KV heads allow TP4; two taps fall on language layers 0 and 1; one merged visual token is one
    cell of a scene. The narrow ffn keeps the policy and the eight-expert discriminator below 8 MB in bf16.
    """
    end_of_turn, end_of_text = token_ids["<|im_end|>"], token_ids["<|endoftext|>"]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_turn,
            "pad_token_id": end_of_text,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": 0.05,
            "intermediate_size": 160,
            "max_position_embeddings": 4096,
            "num_attention_heads": 8,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": vocab_size,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": [0, 1],
            "depth": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "in_channels": 3,
            "initializer_range": 0.05,
            "intermediate_size": 160,
            "num_heads": 4,
            "num_position_embeddings": 64,
            "out_hidden_size": 128,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


@dataclass(frozen=True)
class SupervisedPhase:
    """One supervised phase of the recipe."""

    steps: int
    """optimizer steps"""
    rows_per_step: int
    """demonstrations in a step, over all data-parallel ranks"""
    optimizer: OptimizerConfig
    """AdamW and its schedule"""


@dataclass(frozen=True)
class WarmStartPhase:
    """The discriminator's warm-start against fresh samples of the supervised policy."""

    steps: int = 80
    """optimizer steps"""
    prompts_per_step: int = 16
    """prompts in a step, over all data-parallel ranks"""
    rollouts_per_prompt: int = 2
    """samples of one prompt"""
    load_balance: float = 0.005
    """load-balancing coefficient per layer, tower and sequence: the paper's pooled 0.01 as 0.01 · top_k / layers"""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=1e-3, schedule="cosine", min_lr_ratio=0.1, warmup_steps=8, beta2=0.95
        )
    )
    """AdamW and its schedule"""


@dataclass(frozen=True)
class MakeMiniConfig:
    """Make a mini world: base, supervised policy and warm-started discriminator."""

    output: Path
    """folder to write; gets base/, policy/ and discriminator/"""
    world: MiniWorld = "habits"
    """habits: from random weights, with the tokenizer; drift: from the shipped policy of habits"""
    seed: int = 0
    """keys the initial weights, the scenes and the sampling"""
    data_parallel: int = 2
    """processes to start"""
    pretrain: SupervisedPhase = field(
        default_factory=lambda: SupervisedPhase(
            steps=1200,
            rows_per_step=32,
            optimizer=OptimizerConfig(lr=2.5e-3, schedule="cosine", min_lr_ratio=0.05, warmup_steps=60, beta2=0.95),
        )
    )
    """what stands in for an Instruct base: all parameters and mild noise; drift: vision frozen, and no noise"""
    sft: SupervisedPhase = field(
        default_factory=lambda: SupervisedPhase(
            steps=120,
            rows_per_step=32,
            optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", min_lr_ratio=0.05, warmup_steps=6, beta2=0.95),
        )
    )
    """the world's systematically sloppy mix, vision tower and projector frozen"""
    warm_start: WarmStartPhase = field(default_factory=WarmStartPhase)
    """Bradley-Terry on references against samples"""
    min_auc: float = 0.8
    """within-group AUC per tower on held-out prompts below which the discriminator is refused; 0 refuses none"""
    measured_scenes: Annotated[int, NOT_NEGATIVE] = 512
    """held-out scenes that the base and the policy answer, for the record; 0 asks none"""


def make_mini_recipe(world: MiniWorld) -> MakeMiniConfig:
    """Rates and sizes of a world's three phases."""
    if world == "habits":
        return MakeMiniConfig(output=Path("runs/mini"))

    def rate(lr: float, warmup_steps: int, *, least: float = 0.05) -> OptimizerConfig:
        return OptimizerConfig(lr=lr, schedule="cosine", min_lr_ratio=least, warmup_steps=warmup_steps, beta2=0.95)

    return MakeMiniConfig(
        output=Path("runs/mini-drift"),
        world=world,
        pretrain=SupervisedPhase(steps=300, rows_per_step=32, optimizer=rate(1e-3, 15)),
        sft=SupervisedPhase(steps=120, rows_per_step=32, optimizer=rate(1e-3, 6)),
        warm_start=WarmStartPhase(steps=120, optimizer=rate(7e-4, 12, least=0.1)),
    )
