"""Causal self-attention over padded rows or packed sequences, with or without context parallelism.

``RotaryAttention`` is Megatron's SelfAttention with rotary angles of its own for every token; ``SDPACoreAttention`` is
its core where Transformer Engine is absent. Megatron's plain core materialises the score matrix and knows neither
packing nor context parallelism; torch's kernels are called here once for each run of equal sequences instead.
Shape suffixes: L tokens of this context-parallel rank, S tokens of a row, B rows, H query heads of this
tensor-parallel rank, G its key/value heads, D head size, C tokens of a chunk, N sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from prism_megatron.engine.layers.recompute import checkpointed
from prism_megatron.engine.layers.sdpa import is_square_cheaper, scaled_dot_product_attention
from prism_megatron.parallel.host_to_device import on_device
from prism_megatron.parallel.layout import zigzag


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the sequences of a micro-batch lie: what attention needs beside queries, keys and values.

    ``slots`` are the padded lengths that follow one another in every row. ``prefixes``, empty or one for each slot, are
    first token and length of what stands before a slot's tokens for attention (see ``engine.batch.Batch``). Under
    context parallelism ``token_of_gathered_S[i]`` is the token at place i when the ranks' shares stand one after the
    other, and ``place_of_token_S`` is its inverse.
    """

    slots: tuple[int, ...]
    prefixes: tuple[tuple[int, int], ...] = ()
    token_of_gathered_S: Tensor | None = None
    place_of_token_S: Tensor | None = None

    @classmethod
    def of(
        cls,
        slots: tuple[int, ...],
        *,
        prefixes: tuple[tuple[int, int], ...] = (),
        cp_size: int,
        device: torch.device,
    ) -> Sequences:
        """The same on every context-parallel rank."""
        if cp_size == 1:
            return cls(slots, prefixes)
        tokens = np.concatenate([zigzag(slots, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)])
        return cls(slots, prefixes, on_device(tokens, device), on_device(np.argsort(tokens), device))

    def runs(self) -> Iterator[tuple[int, int, slice]]:
        """Each run of neighbours of one length and one prefix: length, how many, and the prefix's tokens."""
        prefixes = self.prefixes or ((0, 0),) * len(self.slots)
        for (slot, (first, length)), run in itertools.groupby(zip(self.slots, prefixes, strict=True)):
            yield slot, len(list(run)), slice(first, first + length)


def rotate(x: Tensor, cos_L_B_1_D: Tensor, sin_L_B_1_D: Tensor) -> Tensor:
    """Turn ``x [L, B, heads, D]`` by per-token angles.

    Entries d and d + D/2 are the two coordinates of a plane, and their angles are equal. As in transformers, but for
    bf16, where it rounds both products and their sum and this rounds once less.
    """
    turned: Tensor = _Rotate.apply(x, cos_L_B_1_D, sin_L_B_1_D)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """Needs nothing of ``x`` for the backward pass, which turns the gradient back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, sign=1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grad, *ctx.saved_tensors, sign=-1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return turned


class RotaryAttention(SelfAttention):
    """Megatron's projections, norms and heads around a core that is given the angles and places of every token.

    Megatron's own rotary takes one table for all rows, and restarts it by itself for packed sequences; ours is exact
    for any positions, because the angles come token by token.
    """

    recompute_core = False
    """whether the backward pass computes the core attention again instead of keeping its intermediates"""

    def forward(self, hidden: Tensor, cos_L_B_1_D: Tensor, sin_L_B_1_D: Tensor, sequences: Sequences) -> Tensor:
        """``hidden [L or L/tp, B, hidden]`` to the same; the angles are those of this rank's L tokens."""
        query, key, value = self.get_query_key_value_tensors(hidden, None)
        query, key = rotate(query, cos_L_B_1_D, sin_L_B_1_D), rotate(key, cos_L_B_1_D, sin_L_B_1_D)
        if self.recompute_core:
            context = checkpointed(self.core_attention, query, key, value, sequences, fp8=bool(self.config.fp8))
        else:
            context = self.core_attention(query, key, value, sequences)
        output: Tensor = self.linear_proj(context)[0]
        return output


class SDPACoreAttention(nn.Module):
    """Causal grouped-query attention inside each sequence: ``[L, B, H, D], [L, B, G, D] x 2 -> [L, B, H · D]``.

    Sequences are padded on the right, so the causal mask already keeps padding out of every real token. Context
    parallelism gathers keys and values (``all_gather``), or exchanges tokens for heads (``a2a``, DeepSpeed-Ulysses,
    arXiv:2309.14509), as the config's ``cp_comm_type`` says; both give every rank its own tokens' output.
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
        del layer_number, name
        super().__init__()
        if attention_type != "self" or attn_mask_type != AttnMaskType.causal:
            raise ValueError("SDPACoreAttention computes causal self-attention only")
        if (config.attention_dropout if attention_dropout is None else attention_dropout) > 0.0:
            raise ValueError("SDPACoreAttention has no dropout; set attention_dropout to 0")
        self.softmax_scale = softmax_scale
        self.cp_group: ProcessGroup | None = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.cp_group = pg_collection.cp
        self.cp_comm_type = cp_comm_type

    def forward(
        self, query_L_B_H_D: Tensor, key_L_B_G_D: Tensor, value_L_B_G_D: Tensor, sequences: Sequences
    ) -> Tensor:
        """Attend inside each of ``sequences``."""
        tensors = (query_L_B_H_D, key_L_B_G_D, value_L_B_G_D)
        if self.cp_group is None:
            context = self._whole(*tensors, sequences)
        elif self.cp_comm_type == "a2a":
            query, key, value = tokens_for_heads(tensors, sequences, self.cp_group)
            context = heads_for_tokens(self._whole(query, key, value, sequences), sequences, self.cp_group)
        else:
            context = self._own_chunks(*tensors, sequences, self.cp_group)
        return context.flatten(2)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Tensor:
        """All tokens are here."""
        runs = list(sequences.runs())
        # Split at once: the gradient of a slice is as long as the row, and there may be a slice for every sequence.
        own = zip(*(x.split([slot * count for slot, count, _ in runs]) for x in (query, key, value)), strict=True)
        parts = []
        for (slot, count, prefix), run in zip(runs, own, strict=True):
            q, k, v = (x.unflatten(0, (count, slot)) for x in run)
            k, v = _after(key, prefix, k), _after(value, prefix, v)
            parts.append(self._attend(q, k, v).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _own_chunks(
        self, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, group: ProcessGroup
    ) -> Tensor:
        """Keys and values are gathered; each of this rank's two chunks sees the keys up to its own end."""
        size, rank = group.size(), group.rank()
        key, value = gather_tokens(torch.stack((key, value), dim=2), sequences, group).unbind(2)
        parts, start, local = [], 0, 0
        for slot, count, prefix in sequences.runs():
            chunk = slot // (2 * size)
            end, local_end = start + slot * count, local + 2 * chunk * count
            q = query[local:local_end].unflatten(0, (count, 2, chunk))
            k, v = (_after(x, prefix, x[start:end].unflatten(0, (count, slot))) for x in (key, value))
            before = prefix.stop - prefix.start
            seen = [before + (number + 1) * chunk for number in (rank, 2 * size - 1 - rank)]
            halves = [self._attend(q[:, half], k[:, : seen[half]], v[:, : seen[half]]) for half in (0, 1)]
            parts.append(torch.stack(halves, dim=1).flatten(0, 2))
            start, local = end, local_end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend(self, q_N_C_B_H_D: Tensor, k_N_S_B_G_D: Tensor, v_N_S_B_G_D: Tensor) -> Tensor:
        """The C queries are the last of the S tokens of each sequence."""
        query, key, value = (x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q_N_C_B_H_D, k_N_S_B_G_D, v_N_S_B_G_D))
        if is_square_cheaper(query, key):
            query = functional.pad(query, (0, 0, key.shape[2] - query.shape[2], 0))
        num_queries, num_keys = query.shape[2], key.shape[2]
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if num_queries == num_keys else causal_lower_right(num_queries, num_keys),
            is_causal=num_queries == num_keys,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        context = context[:, :, num_queries - q_N_C_B_H_D.shape[1] :]
        context_N_C_B_H_D: Tensor = context.unflatten(0, (len(q_N_C_B_H_D), -1)).permute(0, 3, 1, 2, 4)
        return context_N_C_B_H_D


def _after(row_L_B_G_D: Tensor, prefix: slice, x_N_S_B_G_D: Tensor) -> Tensor:
    """The same tokens of the row before those of each of N sequences."""
    if prefix.start == prefix.stop:
        return x_N_S_B_G_D
    prefix_N_P_B_G_D = row_L_B_G_D[prefix].unsqueeze(0).expand(len(x_N_S_B_G_D), -1, -1, -1, -1)
    return torch.cat([prefix_N_P_B_G_D, x_N_S_B_G_D], dim=1)


def gather_tokens(x_L: Tensor, sequences: Sequences, group: ProcessGroup) -> Tensor:
    """Every rank's tokens, in the order of the row. The backward pass sums each token's gradient over the ranks."""
    assert sequences.place_of_token_S is not None
    gathered = gather_from_sequence_parallel_region(x_L, group=group)
    in_order: Tensor = gathered.index_select(0, sequences.place_of_token_S)
    return in_order


def tokens_for_heads(tensors: Sequence[Tensor], sequences: Sequences, group: ProcessGroup) -> list[Tensor]:
    """From this rank's tokens with all heads to all tokens with this rank's share of the heads: one exchange."""
    assert sequences.place_of_token_S is not None
    size = group.size()
    by_rank = [x.unflatten(2, (size, -1)) for x in tensors]
    sent = torch.cat(by_rank, dim=3).permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous()
    received: Tensor = all_to_all(group, sent)
    in_order = received.index_select(0, sequences.place_of_token_S)
    return list(in_order.split([x.shape[3] for x in by_rank], dim=2))


def heads_for_tokens(x_S_B_H_D: Tensor, sequences: Sequences, group: ProcessGroup) -> Tensor:
    """The way back: from all tokens with a share of the heads to this rank's tokens with all heads."""
    assert sequences.token_of_gathered_S is not None
    received = all_to_all(group, x_S_B_H_D.index_select(0, sequences.token_of_gathered_S))
    own: Tensor = received.unflatten(0, (group.size(), -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    return own
