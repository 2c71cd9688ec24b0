"""Micro-batches for tiny models, by the name of what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.parity.samples import PAD, image, row
from prism_megatron.types import TokenSequence


def shape_of(config: Mapping[str, Any]) -> Qwen3VLShape:
    return Qwen3VLShape.from_dict(config)


def tiny_rows(case: str) -> list[TokenSequence]:
    """Rows of a named case: ``images``, ``shared`` (rows share an image), ``text`` (no image), ``video``."""
    rng = np.random.default_rng(7)
    small, wide, tall = (image(rng, grid) for grid in ((1, 4, 4), (1, 4, 8), (1, 6, 2)))
    if case == "images":
        return [row(rng, 3, small, 5, wide, 4), row(rng, 9), row(rng, tall, 6, small, 2)]
    if case == "shared":
        return [row(rng, 3, wide, 7), row(rng, 3, wide, 4), row(rng, 2, small, 3, wide, 1)]
    if case == "text":
        return [row(rng, 7), row(rng, 12)]
    if case == "video":
        return [row(rng, 3, image(rng, (3, 4, 6)), 4, small, 2), row(rng, 5)]
    raise ValueError(case)


def tiny_batch(case: str, *, multiple_of: int = 1, pack: bool = False) -> Batch:
    return collate(
        tiny_rows(case),
        pad_token_id=PAD,
        multiple_of=multiple_of,
        pack=pack,
        device=torch.device("cpu"),
    )


def real_tokens(batch: Batch) -> Tensor:
    """``[B, S]``: which positions are not padding."""
    return torch.arange(batch.input_ids_B_S.shape[1])[None] < batch.lengths_Q[:, None]
