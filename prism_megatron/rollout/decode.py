"""Prefill and decode of a transformers Qwen3-VL for many samples of each prompt.

Shape suffixes: P prompts, R rows (samples still running), S prompt positions (padded right), H query heads, K
key/value heads, D head size, C channels of the hidden state, V vocabulary.

The prompt goes through transformers' own model once. A decode step is written out here: transformers spends over
1,200 small tensor calls on one of the mini, this about 80. Experts are the exception: a layer that has them calls
transformers' own block. ``tests/unit/rollout`` holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prism_megatron.rollout.shared_prompt import SharedPrompts
from prism_megatron.types import Prompt


@dataclass(frozen=True, eq=False)
class _Layer:
    """One decoder layer as a decode step uses it: its weights (``qkv`` is one matrix), and ``mlp``, ``[R, C]`` to the
    same."""

    input_norm: Tensor
    qkv: Tensor
    query_norm: Tensor
    key_norm: Tensor
    output: Tensor
    post_norm: Tensor
    mlp: Callable[[Tensor], Tensor]


class Decoder:
    """Reads the live weights of ``model``: what is copied into the model in place is used by the next step.

    Query, key and value projections (and gate and up of a dense MLP) become slices of one buffer, so that a step
    multiplies once.
    """

    def __init__(self, model: Any) -> None:
        text = model.config.text_config
        self.model = model
        self.num_heads: int = text.num_attention_heads
        self.num_kv_heads: int = text.num_key_value_heads
        self.head_dim: int = text.head_dim
        self.eps: float = text.rms_norm_eps
        self._layers = [self._gather(layer) for layer in model.model.language_model.layers]

    @staticmethod
    def _gather(layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        has_experts = hasattr(mlp, "experts")
        return _Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=_fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
            query_norm=attention.q_norm.weight,
            key_norm=attention.k_norm.weight,
            output=attention.o_proj.weight,
            post_norm=layer.post_attention_layernorm.weight,
            mlp=partial(_expert_mlp, block=mlp) if has_experts else _dense_mlp(mlp),
        )

    def prefill(self, prompts: Sequence[Prompt], counts: Sequence[int], num_new: int) -> tuple[Tensor, DecodeState]:
        """Run each prompt once. Returns the logits ``[R, V]`` of the first new token and the state of all R rows.

        The rows of a prompt, ``counts[p]`` of them, follow those of the prompt before it. Padding stands right of a
        prompt, where causal attention never looks; decode steps mask it. A row has room for ``num_new`` tokens.
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
        counts_P = torch.tensor(counts, device=device)
        logits = self.model.lm_head(last_P_C).repeat_interleave(counts_P, dim=0)
        next_position_P = lengths_P + deltas_P_1[:, 0]
        state = DecodeState(
            store=SharedPrompts(
                [(layer.keys, layer.values) for layer in result.past_key_values.layers],
                counts,
                num_new,
                None if real_P_S.all() else ~real,
            ),
            next_position_R=next_position_P.repeat_interleave(counts_P),
            rope=self._rope_table(int(next_position_P.max()) + num_new),
            head_norms=[self._head_norm(layer) for layer in self._layers],
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

    def _head_norm(self, layer: _Layer) -> Tensor:
        """The norm weight of every query and key head, ``[H + K, D]``, so that one product serves both."""
        query = layer.query_norm.expand(self.num_heads, -1)
        return torch.cat((query, layer.key_norm.expand(self.num_kv_heads, -1)))

    def step(self, tokens_R: Tensor, state: DecodeState) -> Tensor:
        """Append one token to every row of ``state`` and return the logits ``[R, V]`` of the next one."""
        num_rows, num_rotated = tokens_R.shape[0], self.num_heads + self.num_kv_heads
        cos = state.rope[0][state.next_position_R]
        sin = state.rope[1][state.next_position_R]
        x = F.embedding(tokens_R, self.model.get_input_embeddings().weight)
        for index, layer in enumerate(self._layers):
            fused = F.linear(self._norm(x, layer.input_norm), layer.qkv).view(num_rows, -1, self.head_dim)
            rotated = F.rms_norm(fused[:, :num_rotated], (self.head_dim,), None, self.eps) * state.head_norms[index]
            rotated = torch.addcmul(rotated * cos, rotated.roll(self.head_dim // 2, -1), sin)
            attended = state.store.attend(
                index, rotated[:, : self.num_heads], rotated[:, self.num_heads :], fused[:, num_rotated:]
            )
            x = x + F.linear(attended.to(x.dtype), layer.output)
            x = x + layer.mlp(self._norm(x, layer.post_norm))
        state.store.advance()
        state.next_position_R = state.next_position_R + 1
        logits: Tensor = self.model.lm_head(self.model.model.language_model.norm(x))
        return logits

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


@dataclass(eq=False)
class DecodeState:
    """What a decode step reads and extends."""

    store: SharedPrompts
    next_position_R: Tensor
    rope: tuple[Tensor, Tensor]
    head_norms: Sequence[Tensor]
    """by layer, as of the weights at the prefill"""

    def keep(self, rows: Tensor) -> None:
        """Drop every row whose index is not in ``rows``, which ascend."""
        self.store.keep(rows)
        self.next_position_R = self.next_position_R[rows]


def _dense_mlp(mlp: Any) -> Callable[[Tensor], Tensor]:
    return partial(_gated, gate_up=_fuse([mlp.gate_proj, mlp.up_proj]), down=mlp.down_proj.weight, act=mlp.act_fn)


def _gated(x: Tensor, *, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(act(gate) * up, down)


def _expert_mlp(x: Tensor, *, block: Any) -> Tensor:
    """transformers' router and experts on the rows as one sequence: what a row gets does not depend on the others."""
    routed: Tensor = block(x[None])[0]
    return routed


def _fuse(linears: Sequence[Any]) -> Tensor:
    """One matrix of all weights, of which each linear's weight becomes a slice."""
    fused = torch.cat([linear.weight.data for linear in linears])
    start = 0
    for linear in linears:
        end = start + linear.weight.shape[0]
        linear.weight.data = fused[start:end]
        start = end
    return fused
