"""Builds the pipeline chunks of a discriminator and names its weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from model_providers.moe_discriminator.folder import read_towers
from model_providers.moe_discriminator.mapping import EXPERT_LAYOUT, weight_mappings
from model_providers.moe_discriminator.model import Discriminator
from model_providers.moe_discriminator.routing import TowerRouter
from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.provider import text_config
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.config.precision import PrecisionConfig
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.config.recompute import RecomputeConfig
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.engine.experts import expert_layer
from prism_megatron.engine.specs import decoder_layer_spec, layer_parts
from prism_megatron.errors import ConfigError, ConversionError

_KEEP_ALL = RecomputeConfig()
_PLAIN = PrecisionConfig()


class DiscriminatorProvider:
    """A discriminator with the sizes of a dense Qwen3-VL (see ``engine.provider.ModelProvider``)."""

    def __init__(
        self,
        shape: Qwen3VLShape,
        towers: Towers,
        *,
        head_dropout: float = 0.1,
        freeze_vision: bool = False,
        recompute: RecomputeConfig = _KEEP_ALL,
        precision: PrecisionConfig = _PLAIN,
        layers: Literal["te", "torch"] = "torch",
    ) -> None:
        """``shape`` is the dense model's; ``layers`` is ``Capabilities.layers``.

        ConfigError for a shape that has experts already, or a dropout outside [0, 1).
        """
        if shape.text.num_experts:
            raise ConfigError(
                f"a discriminator is built on a dense Qwen3-VL, not on one with {shape.text.num_experts} experts"
            )
        if not 0.0 <= head_dropout < 1.0:
            raise ConfigError(f"--head-dropout {head_dropout} must be at least 0 and below 1")
        self.shape = shape
        self.towers = towers
        self.head_dropout = head_dropout
        self.freeze_vision = freeze_vision
        self.recompute = recompute
        self.precision = precision
        self.layers: Literal["te", "torch"] = layers

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        head_dropout: float = 0.1,
        freeze_vision: bool = False,
        recompute: RecomputeConfig = _KEEP_ALL,
        precision: PrecisionConfig = _PLAIN,
        layers: Literal["te", "torch"] = "torch",
    ) -> Self:
        """The provider of a saved discriminator. Raises ConfigError when the folder holds none."""
        towers = read_towers(folder)
        return cls(
            Qwen3VLShape.from_folder(folder),
            towers,
            head_dropout=head_dropout,
            freeze_vision=freeze_vision,
            recompute=recompute,
            precision=precision,
            layers=layers,
        )

    def transformer_config(self, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Megatron's config of the language tower. Raises ConfigError for a layout that does not fit the model."""
        self.towers.check_expert_parallel(parallel.ep)
        experts = self.towers.experts(self.shape.text.ffn)
        return text_config(self.shape, parallel, dtype, experts=experts, precision=self.precision, layers=self.layers)

    def build_chunk(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> Discriminator:
        """One pipeline chunk; weights are left uninitialised, for loading."""
        parts = layer_parts(self.layers)
        experts = expert_layer(functools.partial(TowerRouter, towers=self.towers), groups, parts)
        return Discriminator(
            config,
            self.shape,
            decoder_layer_spec(experts, self.recompute, parts),
            groups,
            recompute_vision=self.recompute.recompute_vision,
            head_dropout=self.head_dropout,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )

    def expert_layout(self, _source: TensorSource, /) -> ExpertLayout:
        """The one layout that discriminators are stored in."""
        return EXPERT_LAYOUT

    def weight_mappings(self, layout: ExpertLayout | None = None) -> Sequence[WeightMapping]:
        """Every tensor of a discriminator folder exactly once. Raises ConversionError for another ``layout``."""
        if layout not in (None, EXPERT_LAYOUT):
            raise ConversionError(f"a discriminator stores its experts as {EXPERT_LAYOUT!r}, never as {layout!r}")
        return weight_mappings(self.shape, self.towers)

    def is_frozen(self, parameter_name: str) -> bool:
        """Whether a parameter of a chunk stays as loaded."""
        return self.freeze_vision and parameter_name.startswith("vision_model.")
