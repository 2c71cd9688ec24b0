"""Norm layers as Hugging Face computes them, usable under sequence parallelism.

Megatron's plain torch norm refuses sequence parallelism. Here the weight is only marked: each tensor-parallel rank
normalises its own rows, and ``finalize_model_grads`` sums the gradients of marked weights over the ranks.
"""

from __future__ import annotations

from typing import Any

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


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row for the backward pass, where autograd would keep four copies of the input.

    With n = x / rms(x): y = w n, dw = sum(g n), and dx = (w g - n mean(w g n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _widened(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        output: Tensor = (wide * inverse_rms).to(x.dtype).mul_(weight)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        wide_grad = _widened(grad)
        normalised = _widened(x) * inverse_rms
        projected = wide_grad * normalised
        weight_grad = projected.flatten(0, -2).sum(0).to(weight.dtype)
        mean = projected.matmul(weight.to(projected.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        x_grad = (wide_grad * weight).addcmul_(normalised, mean, value=-1.0).mul_(inverse_rms)
        return x_grad.to(x.dtype), weight_grad, None


def _widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension: float32 inside, weight multiplied after casting back.

    As ``Qwen3VLTextRMSNorm`` of transformers. The constructor is the one Megatron's specs call.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return output


class LayerNorm(nn.Module):
    """Layer norm with bias over the last dimension, as ``torch.nn.LayerNorm``."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(hidden_size, config)
        self.bias = _parameter(hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
