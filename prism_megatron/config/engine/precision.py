"""Which kernels a model's layers use, and whether their matrix products run in FP8."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.transformer_engine import check_transformer_engine, installed_transformer_engine
from prism_megatron.config.fields import NOT_NEGATIVE, OnResume
from prism_megatron.errors import ConfigError

Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]


@dataclass(frozen=True)
class PrecisionConfig:
    """Transformer Engine and its FP8, for the decoder layers of every model of a run.

    The vision tower, embeddings, output layer, router and score head never run in FP8.
    """

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    transformer_engine: Annotated[Literal["auto", "on", "off"], OnResume.FREE] = "auto"
    """build decoder layers from Transformer Engine's modules; auto does where it and a CUDA device are present"""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """FP8 format of the decoder's matrix products: hybrid has E4M3 forward and E5M2 gradients"""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """how FP8 scales are found; delayed keeps a history, which a resumed run starts anew"""
    fp8_first_layers_bf16: Annotated[int, NOT_NEGATIVE] = 0
    """language layers at the start that stay in bf16 under --fp8"""
    fp8_last_layers_bf16: Annotated[int, NOT_NEGATIVE] = 0
    """language layers at the end that stay in bf16 under --fp8"""
    fp32_head: bool = False
    """a bf16 policy's logits are products in fp32, and so are their gradients: bf16 logits of 20 lie 0.125 apart"""

    @property
    def fp8_multiple(self) -> int:
        """What the sides of a matrix must divide by for an FP8 product; 1 without FP8.

        Megatron's ``fp8_utils.get_fp8_align_size``: MXFP8 scales blocks of 32, the others feed Tensor Cores by 16.
        """
        if self.fp8 == "none":
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    def length_multiple(self, parallel: ParallelConfig) -> int:
        """What sequence lengths are padded to, so that the tokens of every rank make whole FP8 blocks.

        A row may be alone in its micro-batch, and under sequence parallelism a rank has one tp-th of its tokens.
        """
        return math.lcm(parallel.length_multiple, self.fp8_multiple * parallel.cp * parallel.tp)

    def transformer_settings(self) -> dict[str, Any]:
        """The fields of Megatron's ``TransformerConfig`` that these flags set."""
        if self.fp8 == "none":
            return {}
        return {
            "fp8": self.fp8,
            "fp8_recipe": self.fp8_recipe,
            "first_last_layers_bf16": self.fp8_first_layers_bf16 + self.fp8_last_layers_bf16 > 0,
            "num_layers_at_start_in_bf16": self.fp8_first_layers_bf16,
            "num_layers_at_end_in_bf16": self.fp8_last_layers_bf16,
        }


def check_precision(
    precision: PrecisionConfig, parallel: ParallelConfig, shape: Qwen3VLShape, *, dtype: str, packs: bool = True
) -> None:
    """Raise ConfigError for FP8 settings that contradict one another, the model, the layout or what is installed.

    ``dtype`` is that of the parameters, as ``--dtype`` (fp32, bf16) or a model folder (float32, bfloat16) spells it;
    ``packs`` says whether rows hold several sequences.
    """
    check_transformer_engine(
        f"--fp8 {precision.fp8}" if precision.fp8 != "none" else "--transformer-engine on",
        parallel,
        asked=precision.fp8 != "none" or precision.transformer_engine == "on",
        packs=packs,
        found=installed_transformer_engine(),
    )
    if precision.fp32_head and dtype not in {"bf16", "bfloat16"}:
        raise ConfigError(f"--fp32-head is for a policy in bf16, and this one is in {dtype}; leave it out")
    bf16_layers = {
        "--fp8-first-layers-bf16": precision.fp8_first_layers_bf16,
        "--fp8-last-layers-bf16": precision.fp8_last_layers_bf16,
    }
    for flag, count in bf16_layers.items():
        if count and precision.fp8 == "none":
            raise ConfigError(f"{flag} {count} has no meaning without FP8; add --fp8 hybrid, or leave it out")
    if precision.fp8 == "none":
        return
    if precision.transformer_engine == "off":
        raise ConfigError(
            f"--fp8 {precision.fp8} is Transformer Engine's and cannot run with --transformer-engine off; "
            "use auto or on"
        )
    if dtype not in {"bf16", "bfloat16"}:
        raise ConfigError(f"--fp8 {precision.fp8} works on bf16 parameters, not {dtype}; use --dtype bf16")
    _check_bf16_layers(precision, bf16_layers, num_layers=shape.text.num_layers, pp=parallel.pp)
    for name, size in _matrix_sides(shape, parallel).items():
        if size % precision.fp8_multiple:
            raise ConfigError(
                f"--fp8-recipe {precision.fp8_recipe} multiplies matrices whose sides divide by "
                f"{precision.fp8_multiple}; the {name} of a rank is {size} at --tp {parallel.tp}; use a smaller --tp, "
                "another recipe, or --fp8 none"
            )


def _check_bf16_layers(precision: PrecisionConfig, bf16_layers: dict[str, int], *, num_layers: int, pp: int) -> None:
    total = sum(bf16_layers.values())
    asked = " ".join(f"{flag} {count}" for flag, count in bf16_layers.items() if count)
    if total and precision.fp8_recipe == "delayed":
        raise ConfigError(f"--fp8-recipe delayed has all layers in FP8; use another recipe, or leave out {asked}")
    if total >= num_layers:
        raise ConfigError(f"{asked} leaves none of the {num_layers} layers in FP8; lower it, or use --fp8 none")
    for flag, count in bf16_layers.items():
        if count > num_layers // pp:
            raise ConfigError(
                f"{flag} {count} is more than Megatron takes at --pp {pp}, a stage's {num_layers // pp} of the "
                f"{num_layers} layers; lower it or --pp"
            )


def _matrix_sides(shape: Qwen3VLShape, parallel: ParallelConfig) -> dict[str, int]:
    """Widths of a decoder layer's weights on one rank; a discriminator's experts have the dense model's width."""
    text = shape.text
    mlp = {"MLP width": text.ffn // parallel.tp} if text.experts is None else {}
    return {
        "hidden size": text.hidden,
        "attention width": text.heads * text.head_dim // parallel.tp,
        "query, key and value width": (text.heads + 2 * text.kv_heads) * text.head_dim // parallel.tp,
        **mlp,
        "experts' width": (text.expert_ffn or text.ffn) // parallel.expert_tp,
    }
