"""Scaled dot-product attention as the core of Megatron's SelfAttention.

Megatron's plain attention materialises the score matrix; torch's kernels do not. Shape suffixes: S tokens, B rows,
H query heads of this tensor-parallel rank, G its key/value heads, D head size.
"""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn


class SDPACoreAttention(nn.Module):
    """Grouped-query attention on this rank's heads: ``[S, B, H, D], [S, B, G, D] x 2 -> [S, B, H · D]``.

    Causal when built with ``AttnMaskType.causal``, else over the whole sequence. Rows are padded on the right, so a
    causal mask already keeps padding out of every real token.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        """The keywords are those Megatron 0.16.1 and 0.19.2 pass; ValueError for what is not computed here."""
        del layer_number, cp_comm_type, pg_collection, name
        super().__init__()
        if attention_type != "self" or config.context_parallel_size > 1:
            raise ValueError("SDPACoreAttention computes self-attention without context parallelism")
        if (config.attention_dropout if attention_dropout is None else attention_dropout) > 0.0:
            raise ValueError("SDPACoreAttention has no dropout; set attention_dropout to 0")
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_S_B_H_D: Tensor,
        key_S_B_G_D: Tensor,
        value_S_B_G_D: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Attend. A mask, a bias or packing would be ignored, so each is a ValueError."""
        del attn_mask_type
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SDPACoreAttention takes no mask, bias or packing")
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_S_B_H_D, key_S_B_G_D, value_S_B_G_D))
        context_B_H_S_D = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context_B_H_S_D.permute(2, 0, 1, 3).flatten(2)
