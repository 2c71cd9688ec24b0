"""Keys and values of many samples of each prompt, where a prompt's own are held once, whatever the number of samples.

Attention over the prompt is one matrix product for all samples of it; attention over what a sample has added is its
own. The two softmax sums are merged exactly (Milakov and Gimelshein, 1805.02867, section 3; Juravsky et al.,
2402.05099). All in float32, whatever the model's dtype: the products have no flash kernel's float32 accumulator.

Shape suffixes: P prompts, N places for samples of one prompt, R rows (samples still running), S prompt positions
(padded right), T new positions, K key/value heads, G query heads of each, D head size, E = D + 1: a value and a one, so
that the product that sums values also sums weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Lays rows out as ``[P, N]``: row r, in the order of the prompts, has place ``place_R[r]``; None where it is r."""

    counts: tuple[int, ...]
    """rows of each prompt"""
    place_R: Tensor | None

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> Grid:
        """The first ``counts[p]`` places of prompt p are taken."""
        size = max(counts)
        if min(counts) == size:
            return cls(tuple(counts), None)
        places = [p * size + i for p, count in enumerate(counts) for i in range(count)]
        return cls(tuple(counts), torch.tensor(places, device=device))

    def spread(self, rows: Tensor) -> Tensor:
        """``[R, K, G, D]`` as ``[P·K, N·G, D]``; places without a row hold zeros."""
        num_prompts, size, (_, heads, shared, width) = len(self.counts), max(self.counts), rows.shape
        if self.place_R is not None:
            taken = rows
            rows = rows.new_zeros(num_prompts * size, heads, shared, width)
            rows[self.place_R] = taken
        grid = rows.view(num_prompts, size, heads, shared, width).transpose(1, 2)
        return grid.reshape(num_prompts * heads, size * shared, width)

    def collect(self, grid: Tensor, *, heads: int) -> Tensor:
        """The inverse of ``spread``, as ``[R·K, G, width]``."""
        num_prompts, size, width = len(self.counts), max(self.counts), grid.shape[-1]
        rows = grid.view(num_prompts, heads, size, -1, width).transpose(1, 2).reshape(num_prompts * size, heads, -1)
        if self.place_R is not None:
            rows = rows[self.place_R]
        return rows.reshape(rows.shape[0] * heads, -1, width)


@dataclass(eq=False)
class _Layer:
    prompt_keys_PK_D_S: Tensor
    prompt_values_PK_S_E: Tensor
    own_keys_R_K_D_T: Tensor
    own_values_R_K_T_E: Tensor


class SharedPrompts:
    """The key/value store of one batch of rows, all of which have added ``length`` positions to their prompts."""

    def __init__(
        self, prompts: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int], num_new: int, padded_P_S: Tensor | None
    ) -> None:
        """``prompts`` holds keys and values ``[P, K, S, D]`` by layer, ``counts`` the rows of each prompt.

        Every row has room for ``num_new`` positions. No row attends where ``padded_P_S`` is true.
        """
        keys = prompts[0][0]
        self.heads, self.head_dim = keys.shape[1], keys.shape[3]
        self.length = 0
        self._scale = self.head_dim**-0.5
        self._grid = Grid.of(counts, keys.device)
        self._padded_P_S = padded_P_S
        self._layers = [self._layer(keys, values, sum(counts), num_new) for keys, values in prompts]

    def _layer(self, keys_P_K_S_D: Tensor, values_P_K_S_D: Tensor, num_rows: int, num_new: int) -> _Layer:
        keys, values = keys_P_K_S_D.float().flatten(0, 1), values_P_K_S_D.float().flatten(0, 1)
        own_values = values.new_ones(num_rows, self.heads, num_new, self.head_dim + 1)
        return _Layer(
            (keys * self._scale).transpose(1, 2).contiguous(),
            torch.cat((values, torch.ones_like(values[..., :1])), dim=-1),
            keys.new_empty(num_rows, self.heads, self.head_dim, num_new),
            own_values,
        )

    def attend(self, index: int, query_R_H_D: Tensor, key_R_K_D: Tensor, value_R_K_D: Tensor) -> Tensor:
        """Add the newest key and value of every row to layer ``index``, then attend: float32 ``[R, H·D]``.

        ``advance`` follows once all layers have been through.
        """
        layer, num_rows, end = self._layers[index], query_R_H_D.shape[0], self.length + 1
        layer.own_keys_R_K_D_T[..., self.length] = key_R_K_D * self._scale
        layer.own_values_R_K_T_E[:, :, self.length, : self.head_dim] = value_R_K_D
        query = query_R_H_D.float().view(num_rows, self.heads, -1, self.head_dim)

        scores = torch.bmm(self._grid.spread(query), layer.prompt_keys_PK_D_S)
        if self._padded_P_S is not None:
            scores.view(len(self._grid.counts), -1, scores.shape[-1]).masked_fill_(
                self._padded_P_S[:, None], -torch.inf
            )
        peak = scores.amax(dim=-1, keepdim=True)
        of_prompt = self._grid.collect(
            torch.bmm(scores.sub_(peak).exp_(), layer.prompt_values_PK_S_E), heads=self.heads
        )
        peak = self._grid.collect(peak, heads=self.heads)

        own = torch.bmm(query.flatten(0, 1), layer.own_keys_R_K_D_T.flatten(0, 1)[..., :end])
        top = torch.maximum(peak, own.amax(dim=-1, keepdim=True))
        total = torch.bmm(own.sub_(top).exp_(), layer.own_values_R_K_T_E.flatten(0, 1)[:, :end])
        total.addcmul_(of_prompt, (peak - top).exp_())
        return (total[..., :-1] / total[..., -1:]).view(num_rows, -1)

    def advance(self) -> None:
        """Every layer has the newest position."""
        self.length += 1

    def keep(self, rows: Tensor) -> None:
        """Drop every row whose index is not in ``rows``, which ascend, and every prompt left without one."""
        starts = torch.tensor([0, *accumulate(self._grid.counts)], device=rows.device)
        counts = torch.searchsorted(rows, starts).diff()
        left = counts.nonzero()[:, 0]
        every_prompt = len(left) == len(counts)
        self._grid = Grid.of([count for count in counts.tolist() if count], rows.device)
        for layer in self._layers:
            layer.own_keys_R_K_D_T = layer.own_keys_R_K_D_T.index_select(0, rows)
            layer.own_values_R_K_T_E = layer.own_values_R_K_T_E.index_select(0, rows)
            if not every_prompt:
                layer.prompt_keys_PK_D_S = self._of_prompts(layer.prompt_keys_PK_D_S, left)
                layer.prompt_values_PK_S_E = self._of_prompts(layer.prompt_values_PK_S_E, left)
        if self._padded_P_S is not None and not every_prompt:
            self._padded_P_S = self._padded_P_S[left]

    def _of_prompts(self, held: Tensor, left: Tensor) -> Tensor:
        kept: Tensor = held.view(-1, self.heads, *held.shape[1:]).index_select(0, left)
        return kept.flatten(0, 1)
