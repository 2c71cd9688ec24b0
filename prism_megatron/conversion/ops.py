"""Invertible operations between Hugging Face tensors and the tensor-parallel shards of one Megatron parameter.

Each op has ``split`` (full Hugging Face tensors -> list of tp shards) and ``merge`` (its exact inverse).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Op(Protocol):
    """An exact, lossless rearrangement; no arithmetic."""

    def split(self, tensors: Sequence[Tensor], tp_size: int) -> list[Tensor]: ...

    def merge(self, shards: Sequence[Tensor]) -> list[Tensor]: ...
