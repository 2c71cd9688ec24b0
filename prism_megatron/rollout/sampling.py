"""Keyed sampling: one uniform number per (row, position), turned into a token by the inverse of the CDF.

Shape suffixes: R rows (one per sample), V vocabulary, T new tokens.

No global random state is read, so a resumed run and another split of the prompts over ranks draw the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prism_megatron.rollout.base import Sampling

_WORD = 2**64


def keyed_uniforms(
    *, seed: int, step: int, rows: Sequence[tuple[int, int]], num_positions: int, device: torch.device
) -> Tensor:
    """Uniform numbers in [0, 1), float64 ``[R, T]``, for ``rows`` of (number of the prompt, number of the sample).

    Philox is counter-based: (seed, step) is its key, the row's numbers are the high words of its counter, and the
    low word counts positions, so every number depends on nothing but its own coordinates.
    """
    table = np.empty((len(rows), num_positions))
    key = np.array([seed % _WORD, step % _WORD], dtype=np.uint64)
    for r, (prompt, sample) in enumerate(rows):
        counter = np.array([0, 0, sample, prompt], dtype=np.uint64)
        table[r] = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(num_positions)
    return torch.from_numpy(table).to(device)


def choose_tokens(
    logits_R_V: Tensor, uniforms_R: Tensor, sampling: Sampling, never_sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids ``[R]`` and their log-probs ``[R]`` (float32).

    The log-prob is that of the *whole* softmax at the sampling temperature (temperature 1 when greedy), which is what
    the policy itself computes. Tokens come from that distribution less ``never_sampled`` and, with top_p < 1, less
    everything outside the nucleus, renormalised.
    """
    scaled = logits_R_V.float()
    if sampling.temperature not in (0.0, 1.0):
        scaled = scaled / sampling.temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    if sampling.temperature == 0.0:
        tokens = logprobs.index_fill(-1, never_sampled, -torch.inf).argmax(dim=-1)
    else:
        weights = logprobs.exp().index_fill_(-1, never_sampled, 0.0)
        draw = partial(_draw_from_nucleus, top_p=sampling.top_p) if sampling.top_p < 1.0 else _invert_cdf
        tokens = draw(weights, uniforms_R)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _invert_cdf(weights_R_V: Tensor, uniforms_R: Tensor) -> Tensor:
    """First token whose cumulative weight exceeds u · total. float64: 150,000 float32 terms would lose the tail."""
    cdf = weights_R_V.cumsum(dim=-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, uniforms_R[:, None] * cdf[:, -1:], right=True)[:, 0]
    # u · total may round up to total itself, one step past the last token.
    return tokens.clamp(max=weights_R_V.shape[-1] - 1)


def _draw_from_nucleus(weights_R_V: Tensor, uniforms_R: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens that reach ``top_p`` (Holtzman et al. 2020, section 3.1), then draw."""
    ordered, tokens_R_V = weights_R_V.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    nucleus = ordered.masked_fill(before >= top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
    return tokens_R_V.gather(-1, _invert_cdf(nucleus, uniforms_R)[:, None])[:, 0]
