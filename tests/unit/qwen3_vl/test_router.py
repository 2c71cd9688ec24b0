"""The router chooses and weighs as transformers 5 does, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextConfig, Qwen3VLMoeTextTopKRouter

from model_providers.qwen3_vl.router import softmax_gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.05, 3.0, 100.0], ids=["all tied", "close", "usual", "underflowing"])
def test_gates_and_choice_are_transformers(dtype: torch.dtype, scale: float) -> None:
    """Claim: equal in every bit, in bf16 with its many ties too. Blind spot: the same torch.topk breaks the ties."""
    config = Qwen3VLMoeTextConfig(num_experts=16, num_experts_per_tok=4, hidden_size=32)
    router = Qwen3VLMoeTextTopKRouter(config).to(dtype)
    torch.nn.init.normal_(router.weight, std=scale)
    hidden = torch.randn(200, 32).to(dtype)
    logits, weights, experts = router(hidden)
    gates, chosen = softmax_gates(torch.nn.functional.linear(hidden, router.weight), 4)
    assert torch.equal(gates.gather(-1, experts), weights)
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(-1, experts, value=True))
    assert bool((gates[~chosen] == 0).all())
    assert gates.dtype == logits.dtype == dtype
