"""The decoder layers of one pipeline chunk."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from model_providers.qwen3_vl.deepstack import VisualRows
from prism_megatron.engine.layers.attention import Sequences
from prism_megatron.engine.layers.fp8 import around_all_layers, around_layer
from prism_megatron.engine.layers.norms import RMSNorm
from prism_megatron.engine.layers.specs import NumberedModules


class Decoder(MegatronModule):
    """A run of decoder layers, and the final norm where ``post_process``.

    Layers are kept under their *global* number, so a parameter has one name in every layout and in checkpoints.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_spec: ModuleSpec,
        groups: ProcessGroupCollection,
        *,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        pp_rank = groups.pp.rank()
        self.first_layer: int = get_transformer_layer_offset(config, vp_stage, pp_rank)
        self.layers = NumberedModules(
            (
                build_module(layer_spec, config=config, layer_number=index + 1, pg_collection=groups, vp_stage=vp_stage)
                for index in range(get_num_layers_to_build(config, vp_stage, pp_rank))
            ),
            first=self.first_layer,
        )
        if post_process:
            self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_process = post_process

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        sequences: Sequences,
        *,
        visual: VisualRows,
        taps: Mapping[int, Tensor],
        mlp_args: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Run this chunk's layers on ``hidden [S_local, B, H]``; ``cos`` and ``sin`` are those of ``DecoderLayer``.

        ``taps[k] [V_local, H]`` is added at ``visual`` after global layer k, for the k of this chunk.
        ``mlp_args`` are handed, flat, to the MLP of every layer (a discriminator's router takes the row's tower).
        """
        with around_all_layers(self.config):
            for number, layer in self.layers.numbered():
                with around_layer(self.config, number):
                    hidden = layer(hidden, cos, sin, sequences, *mlp_args)
                tap = taps.get(number)
                if tap is not None:
                    hidden = visual.add(hidden, tap)
        return self.final_layernorm(hidden) if self.post_process else hidden
