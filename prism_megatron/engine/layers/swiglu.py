"""SwiGLU with its backward pass by hand, alone and with the gates of experts.

Shape suffixes: F width of the MLP on this tensor-parallel rank, N tokens of experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) · up``, keeping its input only; the backward pass writes both halves of the gradient in place."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _product(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _gradients(gate_up, grad)


class _WeightedSwiGLU(torch.autograd.Function):
    """``silu(gate) · up · weight``, keeping its inputs only; the backward pass makes the first product again.

    Operations, their order and their roundings are those of autograd through Megatron's unfused expert, which keeps
    what lies between as well: weights in float32 multiply in float32, and the result goes back to the input's dtype.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        return _product(gate_up).mul_(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weights = ctx.saved_tensors
        wide = _product(gate_up).to(weights.dtype)
        weights_grad = wide.mul_(grad).sum(dim=-1, keepdim=True)
        weighted = torch.mul(grad, weights, out=torch.empty_like(grad))
        return _gradients(gate_up, weighted), weights_grad


class _CompiledWeightedSwiGLU(torch.autograd.Function):
    """``_WeightedSwiGLU`` in two kernels that torch compiles: all in float32 between reading and writing."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        output: Tensor = _compiled(_wide_product)(gate_up, weights)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = _compiled(_wide_gradients)(*ctx.saved_tensors, grad)
        return gradients


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for any number of tokens."""
    return torch.compile(function, dynamic=True)


def _wide_product(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up * weights.float()).to(gate_up.dtype)


def _wide_gradients(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of both inputs of ``_wide_product``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid, wide = torch.sigmoid(gate), grad.float()
    silu = gate * sigmoid
    weighted = wide * weights.float()
    gate_grad = weighted * up * sigmoid * (1 + gate * (1 - sigmoid))
    weights_grad = (silu * up * wide).sum(dim=-1, keepdim=True)
    return torch.cat((gate_grad, weighted * silu), dim=-1).to(gate_up.dtype), weights_grad.to(weights.dtype)


def _product(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _gradients(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Of ``gate_up``, from that of ``silu(gate) · up``."""
    gate, up = gate_up.chunk(2, dim=-1)
    gradients = torch.empty_like(gate_up)
    gate_grad, up_grad = gradients.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=up_grad)
    up_grad.mul_(grad)
    torch.mul(grad, up, out=gate_grad)
    torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
    return gradients


def swiglu(gate_up: Tensor) -> Tensor:
    """``[…, 2F] -> […, F]``: the first half goes through SiLU and multiplies the second."""
    output: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]  # torch's Function.apply
    return output


def weighted_swiglu(gate_up_N_2F: Tensor, gates_N: Tensor, *, compiled: bool = False) -> Tensor:
    """``swiglu`` times each token's gate: ``[N, F]`` in the dtype of the first, whatever that of the gates."""
    # Sizes of 0 and 1 would be compiled each by itself.
    form = _CompiledWeightedSwiGLU if compiled and len(gates_N) > 1 else _WeightedSwiGLU
    output: Tensor = form.apply(gate_up_N_2F, gates_N.unsqueeze(-1))  # type: ignore[no-untyped-call]
    return output
