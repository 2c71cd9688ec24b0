"""The config of Megatron's own linear layers over torch, also where decoder layers are Transformer Engine's."""

from __future__ import annotations

import copy

from megatron.core.tensor_parallel import layers
from megatron.core.transformer import TransformerConfig


def torch_linears(config: TransformerConfig) -> TransformerConfig:
    """A copy that fuses weight gradients only where NVIDIA apex's extension is there.

    Transformer Engine's layers need none, and Megatron's refuse to be built without it (``tensor_parallel/layers.py``,
    which keeps what it found in this private name in 0.16.1 and 0.19.2).
    """
    config = copy.copy(config)
    config.gradient_accumulation_fusion &= layers._grad_accum_fusion_available
    return config
