"""Builds the pipeline chunks of a discriminator and names its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from model_providers.moe_discriminator.expert_load import expert_load, take_loads
from model_providers.moe_discriminator.folder import read_variant
from model_providers.moe_discriminator.mapping import expert_layout, weight_mappings
from model_providers.moe_discriminator.model import Discriminator
from model_providers.moe_discriminator.routing import TowerRouter
from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.provider import text_config
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.discriminator import LoadBalanceScope, Modality
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.engine.host.execution import PLAIN, Execution
from prism_megatron.engine.layers.experts import expert_layer
from prism_megatron.engine.layers.mlp import dense_mlp
from prism_megatron.engine.layers.specs import decoder_layer_spec, layer_parts
from prism_megatron.errors import ConfigError, ConversionError


class DiscriminatorProvider:
    """A discriminator with the sizes of a dense Qwen3-VL (see ``engine.provider.ModelProvider``)."""

    def __init__(
        self,
        shape: Qwen3VLShape,
        towers: Towers | None,
        *,
        modality: Modality = "multimodal",
        head_dropout: float = 0.1,
        load_balance_scope: LoadBalanceScope = "sequence",
        router_z_loss: float = 0.0,
        freeze_vision: bool = False,
        execution: Execution = PLAIN,
    ) -> None:
        """``shape`` is the dense model's.

        Without ``towers`` the MLPs stay dense. The vision tower is frozen where ``modality`` is text, too.
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
        self.modality: Modality = modality
        self.head_dropout = head_dropout
        self.load_balance_scope: LoadBalanceScope = load_balance_scope
        self.router_z_loss = router_z_loss
        self.freeze_vision = freeze_vision or modality == "text"
        self.execution = execution

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        head_dropout: float = 0.1,
        load_balance_scope: LoadBalanceScope = "sequence",
        router_z_loss: float = 0.0,
        freeze_vision: bool = False,
        execution: Execution = PLAIN,
    ) -> Self:
        """The provider of a saved discriminator. Raises ConfigError when the folder holds none."""
        variant = read_variant(folder)
        return cls(
            Qwen3VLShape.from_folder(folder),
            variant.towers,
            modality=variant.modality,
            head_dropout=head_dropout,
            load_balance_scope=load_balance_scope,
            router_z_loss=router_z_loss,
            freeze_vision=freeze_vision,
            execution=execution,
        )

    def transformer_config(self, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
        """Megatron's config of the language tower. Raises ConfigError for a layout that does not fit the model."""
        experts = None
        if self.towers is not None:
            self.towers.check_expert_parallel(parallel.ep)
            experts = self.towers.experts(self.shape.text.ffn)
        return text_config(self.shape, parallel, dtype, experts=experts, execution=self.execution)

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
        parts = layer_parts(self.execution.layers)
        mlp: type[MegatronModule] = dense_mlp(groups, parts)
        if self.towers is not None:
            mlp = expert_layer(functools.partial(TowerRouter, towers=self.towers), groups, parts)
        return Discriminator(
            config,
            self.shape,
            decoder_layer_spec(mlp, self.execution.recompute, parts),
            groups,
            towers=self.towers,
            load_balance_scope=self.load_balance_scope,
            router_z_loss=self.router_z_loss,
            recompute_vision=self.execution.recompute.recompute_vision,
            head_dropout=self.head_dropout,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )

    def expert_layout(self, _source: TensorSource, /) -> ExpertLayout | None:
        """The one layout that discriminators are stored in; None without experts."""
        return expert_layout(self.towers)

    def weight_mappings(self, layout: ExpertLayout | None = None) -> Sequence[WeightMapping]:
        """Every tensor of a discriminator folder exactly once. Raises ConversionError for another ``layout``."""
        stored = expert_layout(self.towers)
        if layout not in (None, stored):
            raise ConversionError(f"this discriminator stores its experts as {stored!r}, never as {layout!r}")
        return weight_mappings(self.shape, self.towers)

    def measure(
        self, modules: Sequence[MegatronModule], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> Mapping[str, float]:
        """Which experts the tokens of the pass chose (see ``load.expert_load``)."""
        if self.towers is None:
            return {}
        loads_L_K_E = take_loads(modules, self.shape.text.num_layers, self.towers)
        return expert_load(sum_over_ranks(loads_L_K_E), self.towers)

    def is_frozen(self, parameter_name: str) -> bool:
        """Whether a parameter of a chunk stays as loaded."""
        return self.freeze_vision and parameter_name.startswith("vision_model.")
