"""The gated MLP of a dense decoder layer."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from prism_megatron.engine.layers.layer_parts import LayerParts
from prism_megatron.engine.layers.specs import TORCH_PARTS
from prism_megatron.engine.layers.swiglu import swiglu


class GatedMLP(MLP):
    """Megatron's two linears around ``swiglu``; the biases that Megatron's layers expect back are None."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """``[L, B, H]`` to the same."""
        gate_up, _ = self.linear_fc1(hidden)
        output, _ = self.linear_fc2(swiglu(gate_up))
        return output, None


def dense_mlp(groups: ProcessGroupCollection, library: LayerParts = TORCH_PARTS) -> type[GatedMLP]:
    """A ``GatedMLP`` of the library's linears, bound to its groups (see ``experts.expert_layer``)."""
    submodules = MLPSubmodules(linear_fc1=library.column, linear_fc2=library.row)

    class BoundMLP(GatedMLP):
        def __init__(self, config: TransformerConfig, **_passed_by_0_19: Any) -> None:
            super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)

    return BoundMLP
