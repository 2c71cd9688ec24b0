"""Decoder layers out of Transformer Engine's modules, by way of megatron-core's wrappers.

Imported where ``engine.capabilities`` chose Transformer Engine. Linears and norms are taken unfused: fused into
LayerNormLinear, a norm's weight would change its name, and weights and checkpoints are tied to names.
Nothing in this file has been run on a GPU; ``make te-check`` binds its calls to Transformer Engine's signatures.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts
from megatron.core.utils import is_te_min_version
from torch import Tensor, nn

from prism_megatron.config.engine.transformer_engine import PACKED_ALL_GATHER
from prism_megatron.engine.layers.attention import SDPACoreAttention, Sequences
from prism_megatron.engine.layers.expert_mlps import GroupedExperts
from prism_megatron.engine.layers.layer_parts import LayerParts
from prism_megatron.errors import ConfigError


class TECoreAttention(nn.Module):
    """Transformer Engine's attention, called as ``SDPACoreAttention`` is: ``[L, B, H, D] -> [L, B, H · D]``.

    Rows of one sequence each go in as they are; rows of several as packed sequences, for which B must be 1. Under
    context parallelism both hold zigzag shares of every sequence, the order in which Transformer Engine cuts them.
    Where sequences go on from a prompt that stands once, which Transformer Engine's packed rows cannot say, torch's
    attention takes its place, beside the same linears: on CUDA a flash kernel for each run of equal sequences.
    """

    def __init__(self, *, config: TransformerConfig, cp_comm_type: str | None = None, **keywords: Any) -> None:
        """``keywords`` are what megatron-core passes to every core attention."""
        super().__init__()
        self.context_parallel: bool = config.context_parallel_size > 1
        self.cp_comm_type = cp_comm_type
        keywords.pop("name", None)  # 0.19 names its modules, its TEDotProductAttention takes none
        self.inner = TEDotProductAttention(config=config, cp_comm_type=cp_comm_type, **keywords)
        self.behind_prompts = SDPACoreAttention(config=config, cp_comm_type=cp_comm_type, **keywords)

    def forward(
        self, query_L_B_H_D: Tensor, key_L_B_G_D: Tensor, value_L_B_G_D: Tensor, sequences: Sequences
    ) -> Tensor:
        """Attend inside each of ``sequences``. Raises ConfigError for what this Transformer Engine cannot pack."""
        tensors = (query_L_B_H_D, key_L_B_G_D, value_L_B_G_D)
        if sequences.prefixes:
            shared: Tensor = self.behind_prompts(*tensors, sequences)
            return shared
        if len(sequences.slots) == 1:
            context: Tensor = self.inner(*tensors, attention_mask=None, attn_mask_type=AttnMaskType.causal)
            return context
        if self.context_parallel and self.cp_comm_type == "all_gather" and not is_te_min_version(PACKED_ALL_GATHER):
            raise ConfigError(
                f"--cp-comm all_gather with packed sequences needs Transformer Engine {PACKED_ALL_GATHER} or newer; "
                "use --cp-comm a2a, or do not pack"
            )
        packed: Tensor = self.inner(
            *(x.squeeze(1) for x in tensors),
            attention_mask=None,
            attn_mask_type=AttnMaskType.causal,
            packed_seq_params=packed_parameters(
                sequences.slots, device=query_L_B_H_D.device, context_parallel=self.context_parallel
            ),
        )
        return packed.unsqueeze(1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Empty: attention has no weights."""
        del prefix, sharded_offsets, metadata
        return {}


def packed_parameters(slots: tuple[int, ...], *, device: torch.device, context_parallel: bool) -> PackedSeqParams:
    """Where the sequences of a packed row lie, as Transformer Engine takes it: lengths over all ranks, in tokens.

    A slot counts whole, its padding with it: padding stands on the right, where causal attention keeps it from every
    real token. Context parallelism wants the padded ends as well; given without it they would cost a comparison on
    the device in every layer.
    """
    ends = _ends(slots, device)
    padded = {"cu_seqlens_q_padded": ends, "cu_seqlens_kv_padded": ends} if context_parallel else {}
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(slots),
        max_seqlen_kv=max(slots),
        **padded,
    )


@functools.lru_cache(maxsize=8)  # every layer of a micro-batch asks for the same
def _ends(slots: tuple[int, ...], device: torch.device) -> Tensor:
    lengths = torch.tensor((0, *slots), dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device)


def _grouped_experts() -> Any:
    """The experts of a MoE layer as grouped products, in the form that the installed Megatron's layer takes.

    Megatron pads each expert's tokens to FP8's blocks, and saves the weights under the names one MLP after another
    would have; ``engine.export`` does the same for Hugging Face names.
    """
    linears = {"linear_fc1": TEColumnParallelGroupedLinear, "linear_fc2": TERowParallelGroupedLinear}
    if hasattr(experts, "GroupedMLPSubmodules"):  # 0.19: a callable
        return functools.partial(GroupedExperts, submodules=experts.GroupedMLPSubmodules(**linears))
    return ModuleSpec(module=GroupedExperts, submodules=MLPSubmodules(**linears))


TE_PARTS = LayerParts(
    column=TEColumnParallelLinear,
    row=TERowParallelLinear,
    norm=TENorm,
    core_attention=TECoreAttention,
    experts=_grouped_experts(),
)
