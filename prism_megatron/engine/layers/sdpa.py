"""torch's attention kernel, in the number format in which it is fastest where it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SHORT = 2**14
"""Tokens times head size up to which the CPU's backward kernel takes longer in bf16 than in fp32, casts included: it
prepares its operands anew for every head, which at 190 tokens and a head size of 16 takes four times as long as the
rest. Measured with torch 2.13 on AVX-512 with bf16 instructions."""


LONG = 1024
"""Keys from which ``is_square_cheaper`` looks: below, either way takes no time that matters."""


def is_square_cheaper(query: Tensor, key: Tensor) -> bool:
    """Whether a CPU attends sooner from queries that are padded in front to as many as there are keys.

    Its kernel leaves out what is above the diagonal of a square only; under a mask it goes through all pairs.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    return query.device.type == "cpu" and LONG <= keys < 2 * queries and queries != keys


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """As torch's, ``[N, H, S, D]``. Short sequences of bf16 on a CPU are computed in fp32 and rounded once.

    Which ones depends on shapes alone, so that a recomputed pass is the pass that was.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] * key.shape[-1] <= SHORT:
        wide = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), **settings)
        return wide.to(query.dtype)
    return functional.scaled_dot_product_attention(query, key, value, **settings)
