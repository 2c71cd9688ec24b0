"""Prefill and decode of a transformers Qwen3-VL for many samples of each prompt.

Shape suffixes: P prompts, R rows (samples still running), S prompt positions (padded right), L positions of the
key/value store, H query heads, K key/value heads, D head size, C channels of the hidden state, V vocabulary.

The prompt goes through transformers' own model once. A decode step is written out here: transformers spends over
1,200 small tensor calls on one, this about 80. ``tests/unit/rollout`` holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prism_megatron.types import Prompt


@dataclass(frozen=True, eq=False)
class _Layer:
    """Weights of one decoder layer as a decode step uses them; ``qkv`` and ``gate_up`` are one matrix each."""

    input_norm: Tensor
    qkv: Tensor
    query_norm: Tensor
    key_norm: Tensor
    output: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Decoder:
    """Reads the live weights of ``model``: what is copied into the model in place is used by the next step.

    Query, key and value projections (and gate and up) become slices of one buffer, so that a step multiplies once.
    """

    def __init__(self, model: Any) -> None:
        text = model.config.text_config
        self.model = model
        self.num_heads: int = text.num_attention_heads
        self.num_kv_heads: int = text.num_key_value_heads
        self.head_dim: int = text.head_dim
        self.eps: float = text.rms_norm_eps
        self.act = model.model.language_model.layers[0].mlp.act_fn
        self._layers = [self._gather(layer) for layer in model.model.language_model.layers]

    @staticmethod
    def _gather(layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=_fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
            query_norm=attention.q_norm.weight,
            key_norm=attention.k_norm.weight,
            output=attention.o_proj.weight,
            post_norm=layer.post_attention_layernorm.weight,
            gate_up=_fuse([mlp.gate_proj, mlp.up_proj]),
            down=mlp.down_proj.weight,
        )

    def prefill(self, prompts: Sequence[Prompt], n: int, num_new: int) -> tuple[Tensor, DecodeState]:
        """Run each prompt once. Returns the logits ``[P·n, V]`` of the first new token and the state of P·n rows.

        Row ``p * n + i`` is sample i of prompt p. Padding stands right of a prompt, where causal attention never
        looks; decode steps mask it. The state has room for ``num_new`` tokens a row.
        """
        device = self.model.device
        lengths = np.array([len(prompt.token_ids) for prompt in prompts])
        ids_P_S = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
        for p, prompt in enumerate(prompts):
            ids_P_S[p, : lengths[p]] = prompt.token_ids
        real_P_S = np.arange(lengths.max())[None, :] < lengths[:, None]
        input_ids, real = torch.from_numpy(ids_P_S).to(device), torch.from_numpy(real_P_S).to(device)

        images = [image for prompt in prompts for image in prompt.images]
        inputs: dict[str, Tensor] = {}
        grid = None
        if images:
            grid = torch.tensor([image.grid_thw for image in images], device=device)
            pixels = np.concatenate([image.pixel_values_P_D for image in images])
            inputs = {"pixel_values": torch.from_numpy(pixels).to(device), "image_grid_thw": grid}
        positions_3_P_S, deltas_P_1 = self.model.model.get_rope_index(
            input_ids,
            mm_token_type_ids=(input_ids == self.model.config.image_token_id).int(),
            image_grid_thw=grid,
            attention_mask=real,
        )
        result = self.model.model(input_ids=input_ids, position_ids=positions_3_P_S, use_cache=True, **inputs)
        lengths_P = torch.from_numpy(lengths).to(device)
        last_P_C = result.last_hidden_state[torch.arange(len(prompts), device=device), lengths_P - 1]
        logits = self.model.lm_head(last_P_C).repeat_interleave(n, dim=0)
        next_position_P = lengths_P + deltas_P_1[:, 0]
        state = DecodeState(
            keys=[_with_room(layer.keys, n, num_new) for layer in result.past_key_values.layers],
            values=[_with_room(layer.values, n, num_new) for layer in result.past_key_values.layers],
            hidden_R_L=None if real_P_S.all() else _with_room(~real, n, num_new),
            length=int(lengths.max()),
            next_position_R=next_position_P.repeat_interleave(n),
            rope=self._rope_table(int(next_position_P.max()) + num_new),
        )
        return logits, state

    def _rope_table(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine by position, ``[positions, 1, D]``. The sine is negated where rotate_half negates.

        A text token has the same position on all three axes, so the interleaved MRoPE is plain RoPE here.
        """
        embedding = self.model.get_input_embeddings().weight
        positions = torch.arange(num_positions, device=embedding.device).expand(3, 1, -1)
        cos, sin = self.model.model.language_model.rotary_emb(embedding, positions)
        sign = torch.ones_like(sin)
        sign[..., : self.head_dim // 2] = -1.0
        return cos[0][:, None], (sin * sign)[0][:, None]

    def step(self, tokens_R: Tensor, state: DecodeState) -> Tensor:
        """Append one token to every row of ``state`` and return the logits ``[R, V]`` of the next one."""
        num_rows, num_rotated = tokens_R.shape[0], self.num_heads + self.num_kv_heads
        cos = state.rope[0][state.next_position_R]
        sin = state.rope[1][state.next_position_R]
        end = state.length + 1
        mask = None if state.hidden_R_L is None else ~state.hidden_R_L[:, None, None, :end]
        x = F.embedding(tokens_R, self.model.get_input_embeddings().weight)
        for index, layer in enumerate(self._layers):
            keys, values = state.keys[index], state.values[index]
            fused = F.linear(self._norm(x, layer.input_norm), layer.qkv).view(num_rows, -1, self.head_dim)
            query = self._norm(fused[:, : self.num_heads], layer.query_norm)
            key = self._norm(fused[:, self.num_heads : num_rotated], layer.key_norm)
            both = torch.cat((query, key), dim=1)
            both = torch.addcmul(both * cos, both.roll(self.head_dim // 2, -1), sin)
            keys[:, :, state.length] = both[:, self.num_heads :]
            values[:, :, state.length] = fused[:, num_rotated:]
            # The query heads that share a key head stand where SDPA expects query positions: no key is repeated.
            attended = F.scaled_dot_product_attention(
                both[:, : self.num_heads].view(num_rows, self.num_kv_heads, -1, self.head_dim),
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=mask,
            )
            x = x + F.linear(attended.reshape(num_rows, -1), layer.output)
            gate, up = F.linear(self._norm(x, layer.post_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(self.act(gate) * up, layer.down)
        state.length = end
        state.next_position_R = state.next_position_R + 1
        logits: Tensor = self.model.lm_head(self.model.model.language_model.norm(x))
        return logits

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


@dataclass(eq=False)
class DecodeState:
    """What a decode step reads and extends. Keys and values, ``[R, K, L, D]`` a layer, are used up to ``length``."""

    keys: list[Tensor]
    values: list[Tensor]
    hidden_R_L: Tensor | None
    """positions that no row may attend to (padding of its prompt); None where there are none"""
    length: int
    next_position_R: Tensor
    rope: tuple[Tensor, Tensor]

    def keep(self, rows: Tensor) -> None:
        """Drop every row whose index is not in ``rows``."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.next_position_R = self.next_position_R[rows]
        if self.hidden_R_L is not None:
            self.hidden_R_L = self.hidden_R_L[rows]


def _fuse(linears: Sequence[Any]) -> Tensor:
    """One matrix of all weights, of which each linear's weight becomes a slice."""
    fused = torch.cat([linear.weight.data for linear in linears])
    start = 0
    for linear in linears:
        end = start + linear.weight.shape[0]
        linear.weight.data = fused[start:end]
        start = end
    return fused


def _with_room(prompt_part: Tensor, n: int, num_new: int) -> Tensor:
    """Repeat each prompt's rows n times and append ``num_new`` zeros on the position axis (-2, or -1 of a mask)."""
    axis = -1 if prompt_part.dim() == 2 else -2
    shape = list(prompt_part.shape)
    shape[axis] += num_new
    store = prompt_part.new_zeros((shape[0] * n, *shape[1:]))
    store.narrow(axis, 0, prompt_part.shape[axis]).copy_(prompt_part.repeat_interleave(n, dim=0))
    return store
