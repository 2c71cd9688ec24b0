"""Where FP8 begins and ends: around decoder layers, entered by whoever runs them.

Megatron's TransformerBlock does this for its own layers; ours are run by a decoder of ours. Parameters stay in bf16
(``fp8_param`` is never set); without ``config.fp8`` every context here is empty.
"""

from __future__ import annotations

import contextlib
from typing import Any

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer import TransformerConfig

Context = contextlib.AbstractContextManager[Any]


def around_all_layers(config: TransformerConfig) -> Context:
    """Of a run of layers: delayed scaling updates its history whenever its context is left, so it is entered once."""
    return _context(config) if config.fp8 and config.fp8_recipe == "delayed" else contextlib.nullcontext()


def around_layer(config: TransformerConfig, number: int) -> Context:
    """Of the layer with this global number: FP8, or bf16 for a first or last one that the config spares."""
    return _context(config, number) if config.fp8 and config.fp8_recipe != "delayed" else contextlib.nullcontext()


def _context(*arguments: Any) -> Context:
    context: Context = get_fp8_context(*arguments)
    return context
