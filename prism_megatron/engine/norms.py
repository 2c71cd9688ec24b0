"""Norm layers as Hugging Face computes them, usable under sequence parallelism.

Megatron's plain torch norm refuses sequence parallelism. Here the weight is only marked: each tensor-parallel rank
normalises its own rows, and ``finalize_model_grads`` sums the gradients of marked weights over the ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron's own layers allocate their weights under this config: the default device may be meta."""
    if config.use_cpu_initialization:
        return torch.get_default_device()
    return torch.device("cuda", torch.cuda.current_device())


def _parameter(size: int, config: TransformerConfig) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=parameter_device(config)))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension: float32 inside, weight multiplied after casting back.

    As ``Qwen3VLTextRMSNorm`` of transformers. The constructor is the one Megatron's specs call.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with bias over the last dimension, as ``torch.nn.LayerNorm``."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(hidden_size, config)
        self.bias = _parameter(hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
