"""The gated MLP of a dense decoder layer.

Shape suffixes: F width of the MLP on this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor
from torch.nn import functional

from prism_megatron.engine.layers.layer_parts import LayerParts
from prism_megatron.engine.layers.specs import TORCH_PARTS


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) · up``, keeping its input only; the backward pass writes both halves of the gradient in place."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
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


class GatedMLP(MLP):
    """Megatron's two linears around ``swiglu``; the biases that Megatron's layers expect back are None."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """``[L, B, H]`` to the same."""
        gate_up, _ = self.linear_fc1(hidden)
        output, _ = self.linear_fc2(swiglu(gate_up))
        return output, None


def dense_mlp(groups: ProcessGroupCollection, library: LayerParts = TORCH_PARTS) -> type[GatedMLP]:
    """A ``GatedMLP`` of the library's linears, bound to its groups (see ``experts.expert_layer``)."""
    submodules = MLPSubmodules(linear_fc1=library.column, linear_fc2=library.row)

    class BoundMLP(GatedMLP):
        def __init__(self, config: TransformerConfig, **_passed_by_0_19: Any) -> None:
            super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp)

    return BoundMLP
