"""The loss that parity is measured with: fixed random weights times the logits.

It is linear, so every logit has a gradient of its own and no error can cancel another; the weights belong to a sample,
so they are the same however samples are batched, packed, split or padded.
Shape suffixes: T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.types import TokenSequence


@dataclass(frozen=True, eq=False)
class Sample:
    """One row for the model, and the key of its loss weights."""

    key: int
    row: TokenSequence


def probe_weights(sample: Sample, vocab: int) -> Tensor:
    """``[T, V]`` float32 on the CPU."""
    return random_weights(sample.key, len(sample.row.token_ids), vocab)


def random_weights(key: int, rows: int, columns: int) -> Tensor:
    """The same for the same arguments. Their variance is 1 / columns, so gradients are about as large as weights."""
    generator = torch.Generator().manual_seed(key)
    return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)
