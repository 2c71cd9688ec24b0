"""Weight gradients that are added to their sum inside the product, on a CPU."""

from __future__ import annotations

from torch import Tensor

ROWS = 512
"""Of a weight's gradient in bf16 that are widened at a time. With fewer the products themselves take longer."""


class WeightGradientsOnCpu:
    """Stands in for NVIDIA apex's CUDA extension ``fused_weight_gradient_mlp_cuda``, as Megatron's linears call it.

    A product by itself would be a new tensor, whose memory the system clears first, and which is read once more to be
    added.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs_T_I: Tensor, grad_outputs_T_O: Tensor, total_O_I: Tensor) -> None:
        """Add the gradient of a weight ``[O, I]`` to ``total_O_I``.

        In bf16 every micro-batch's gradient is rounded to bf16 before it is added, as without this (torch adds no
        product of bf16 to a sum in fp32): but a few rows at a time, so that it is nowhere as a whole, nor widened.
        """
        if inputs_T_I.dtype == total_O_I.dtype:
            total_O_I.addmm_(grad_outputs_T_O.t(), inputs_T_I)
            return
        for total_n_I, grad_outputs_T_n in zip(total_O_I.split(ROWS), grad_outputs_T_O.split(ROWS, dim=1), strict=True):
            total_n_I.add_(grad_outputs_T_n.t() @ inputs_T_I)
