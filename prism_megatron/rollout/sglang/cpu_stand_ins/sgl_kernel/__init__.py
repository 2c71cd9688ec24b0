"""On a server process's PYTHONPATH where CUDA is absent: stands in for SGLang's compiled kernels.

Patch 2 of 2 (the other is ``sitecustomize``). Upstream place: ``from sgl_kernel import …`` at the top of modules under
``sglang/srt`` and ``sglang/kernels``, and ``torch.ops.sgl_kernel.*_cpu`` in their CPU branches. Version: sglang 0.5.23.
Reason: sgl_kernel has no CPU wheel, but on a CPU without AMX every layer of Qwen3-VL takes SGLang's native torch path,
so the names are looked up and never called. Until: SGLang guards these imports, or a CPU wheel exists.
"""

from typing import NoReturn

import torch

_OPERATORS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_moe_router_cpu",
    "rmsnorm_cpu",
    "fused_dual_residual_rmsnorm_cpu",
)

for _operator in _OPERATORS:
    torch.library.define(f"sgl_kernel::{_operator}", "() -> ()")


class _Missing:
    """A kernel that can be imported and not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{self._name} is a CUDA kernel; this server runs without CUDA")


def __getattr__(name: str) -> _Missing:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name)
