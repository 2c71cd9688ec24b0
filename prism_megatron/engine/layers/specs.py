"""Decoder layers put together from Megatron modules, and what Megatron leaves out when weights are not initialised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.engine.layers.attention import RotaryAttention, SDPACoreAttention, Sequences
from prism_megatron.engine.layers.expert_mlps import LoopedExperts
from prism_megatron.engine.layers.layer_parts import LayerParts
from prism_megatron.engine.layers.norms import RMSNorm
from prism_megatron.engine.layers.recompute import checkpointed

TORCH_PARTS = LayerParts(
    column=ColumnParallelLinear,
    row=RowParallelLinear,
    norm=RMSNorm,
    core_attention=SDPACoreAttention,
    experts=ModuleSpec(
        module=LoopedExperts,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    ),
)


def layer_parts(library: Literal["te", "torch"]) -> LayerParts:
    """The parts that ``engine.capabilities`` chose; Transformer Engine's are imported only if it did."""
    if library == "torch":
        return TORCH_PARTS
    from prism_megatron.engine.layers.te import TE_PARTS

    return TE_PARTS


class DecoderLayer(TransformerLayer):
    """Pre-norm attention and MLP with residuals.

    The forward pass is our own, so that ``mlp_args`` (flat tensors, e.g. the tower of each row) reach the MLP and
    nothing depends on the fusions, offloading and graph capture that differ between Megatron's versions.
    """

    def __init__(self, *arguments: Any, recompute: RecomputeConfig, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.recompute = recompute
        self.fp8 = bool(self.config.fp8)
        self.self_attention.recompute_core = recompute.recomputes("core_attn")

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences, *mlp_args: Tensor) -> Tensor:
        """``hidden [L or L/tp, B, H]`` to the same; ``cos`` and ``sin [L, B, 1, D]`` (see ``RotaryAttention``)."""
        if self.recompute.recompute == "full":
            output: Tensor = checkpointed(self._layer, hidden, cos, sin, sequences, *mlp_args, fp8=self.fp8)
            return output
        return self._layer(hidden, cos, sin, sequences, *mlp_args)

    def _layer(self, hidden: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences, *mlp_args: Tensor) -> Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), cos, sin, sequences)
        if self.recompute.recomputes("mlp"):
            transformed: Tensor = checkpointed(self._transform, hidden, *mlp_args, fp8=self.fp8)
        else:
            transformed = self._transform(hidden, *mlp_args)
        return hidden + transformed

    def _transform(self, hidden: Tensor, *mlp_args: Tensor) -> Tensor:
        output: Tensor = self.mlp(self.pre_mlp_layernorm(hidden), *mlp_args)[0]
        return output


def decoder_layer_spec(mlp: Any, recompute: RecomputeConfig, parts: LayerParts = TORCH_PARTS) -> ModuleSpec:
    """A causal decoder layer with q/k norm around any ``mlp`` (``mlp.dense_mlp``, or ``experts.expert_layer``).

    The MLP is called as ``mlp(hidden, *mlp_args)`` and returns ``(output, bias)``; the bias is not used.
    """
    attention = ModuleSpec(
        module=RotaryAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column,
            core_attention=parts.core_attention,
            linear_proj=parts.row,
            q_layernorm=parts.norm,
            k_layernorm=parts.norm,
        ),
    )
    return ModuleSpec(
        module=DecoderLayer,
        params={"recompute": recompute},
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm, self_attention=attention, pre_mlp_layernorm=parts.norm, mlp=mlp
        ),
    )


class NumberedModules(nn.Module):
    """Modules under consecutive numbers from ``first``, so that a layer has its global number in every layout.

    Its checkpoint shards are asked of each module: Megatron takes a plain ModuleList for a leaf and would save the
    tensor-parallel weights inside as replicas.
    """

    def __init__(self, modules: Iterable[nn.Module], *, first: int = 0) -> None:
        super().__init__()
        for number, module in enumerate(modules, start=first):
            self.add_module(str(number), module)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def numbered(self) -> Iterator[tuple[int, nn.Module]]:
        """Each module with its number."""
        return ((int(name), module) for name, module in self.named_children())

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The modules' shards under their numbers (see ``MegatronModule.sharded_state_dict``)."""
        shards: ShardedStateDict = {}
        for name, module in self.named_children():
            shards.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata))
        return shards


def mark_tensor_parallel(module: nn.Module) -> None:
    """Mark the sharded weights inside ``module`` as such.

    Megatron marks them while it initialises them (0.16.1, and both versions on the CPU), and we always load weights
    instead. The gradient norm counts an unmarked weight on tensor-parallel rank 0 only, silently.
    """
    for layer in module.modules():
        if isinstance(layer, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            weight = layer.weight
            if weight is not None and not getattr(weight, "tensor_model_parallel", False):
                dim = 1 if isinstance(layer, RowParallelLinear) else 0
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
