"""Weight gradients that are added to their sum inside the product, on a CPU."""

from __future__ import annotations

from torch import Tensor


class WeightGradientsOnCpu:
    """Stands in for NVIDIA apex's CUDA extension ``fused_weight_gradient_mlp_cuda``, as Megatron's linears call it.

    A product by itself would be a new tensor, whose memory the system clears first, and which is read once more to be
    added. Of fp32 alone: torch adds no product of bf16 to a sum in fp32.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs_T_I: Tensor, grad_outputs_T_O: Tensor, total_O_I: Tensor) -> None:
        """Add the gradient of a weight ``[O, I]`` to ``total_O_I``."""
        total_O_I.addmm_(grad_outputs_T_O.t(), inputs_T_I)
