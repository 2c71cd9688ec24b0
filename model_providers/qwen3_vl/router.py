"""The router of a Qwen3-VL with experts.

Shape suffixes: S tokens of this rank, B rows, H hidden, T = S · B tokens flattened, E experts, K chosen experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from prism_megatron.engine.experts import ExpertRouter, spread


def softmax_gates(logits_T_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates (in the dtype of the logits, 0 for experts not chosen) and the chosen experts (bool), both ``[T, E]``.

    Softmax in float32 over all experts, the K largest divided by their sum, then the cast: the operations, their
    order and their dtypes are those of transformers 5.23 (``Qwen3VLMoeTextTopKRouter``), so that equal logits choose
    equal experts, ties included.
    """
    probs_T_E = functional.softmax(logits_T_E, dim=-1, dtype=torch.float32)
    top_T_K, experts_T_K = probs_T_E.topk(top_k, dim=-1)
    gates_T_K = (top_T_K / top_T_K.sum(dim=-1, keepdim=True)).to(logits_T_E.dtype)
    return spread(gates_T_K, experts_T_K, logits_T_E.shape[-1])


class SoftmaxRouter(ExpertRouter):
    """Every token goes to its ``moe_router_topk`` best experts. There is no load-balancing loss.

    The gate's product is in the dtype of the model, as in transformers.
    """

    def forward(self, hidden_S_B_H: Tensor) -> tuple[Tensor, Tensor]:
        """Gates ``[T, E]`` and routing map ``[T, E]`` (bool)."""
        logits_T_E = functional.linear(hidden_S_B_H.flatten(0, 1), self.weight)
        return softmax_gates(logits_T_E, self.config.moe_router_topk)
