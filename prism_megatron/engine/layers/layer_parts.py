"""What a library must bring for decoder layers to be built of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerParts:
    """The modules that decoder layers are built of, as Megatron's specs call them."""

    column: Any
    row: Any
    norm: Any
    core_attention: Any
    experts: Any
    """what a MoE layer takes for the experts of a rank"""
