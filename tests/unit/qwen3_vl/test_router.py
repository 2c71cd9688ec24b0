"""The router chooses and weighs as transformers 5 does, bit for bit, and loses what Megatron's loss says."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from torch import Tensor
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextConfig, Qwen3VLMoeTextTopKRouter

from model_providers.qwen3_vl.router import SoftmaxRouter, expert_figures, softmax_gates
from prism_megatron.config.engine.experts import ExpertSizes, RouterLosses


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


LENGTHS, SHARES = (5, 7), (0.25, 0.35)
"""Of the 20 tokens of a step; the other eight are in other micro-batches."""


def case() -> tuple[Any, Tensor, Tensor]:
    """A router of 6 experts in float32, 14 tokens of which two are padding, and the number of each one's sequence."""
    config = SimpleNamespace(num_moe_experts=6, hidden_size=16, params_dtype=torch.float32, sequence_parallel=False,
                             moe_router_topk=2, moe_router_fusion=False, use_cpu_initialization=True)  # fmt: skip
    groups = SimpleNamespace(tp_cp=SimpleNamespace(size=lambda: 1))
    router = SoftmaxRouter(config, groups, losses=RouterLosses(balance=0.3, z=0.7))
    router.layer_number = 1
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        router.weight.copy_(torch.randn(6, 16, generator=generator))
    sequences = torch.tensor([0] * 5 + [2] + [1] * 7 + [2]).unsqueeze(-1)
    return router, torch.randn(14, 1, 16, generator=generator), sequences


def twin(weight: Tensor, hidden: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, by Megatron's own loss for each sequence by itself, and the z-loss from its formula."""
    balance = z = torch.zeros((), dtype=torch.float64)
    for number, (length, share) in enumerate(zip(LENGTHS, SHARES, strict=True)):
        logits = hidden[sequences.flatten() == number, 0].double() @ weight.t()
        probs = logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter(-1, probs.topk(2, dim=-1).indices, 1.0)
        balance = balance + share * switch_load_balancing_loss_func(
            probs, chosen.sum(0), total_num_tokens=length, topk=2, num_experts=6, moe_aux_loss_coeff=1.0
        )
        z = z + share * logits.exp().sum(-1).log().square().mean()
    return balance, z


def test_losses_are_megatrons_for_each_sequence_in_float64() -> None:
    """Claim: values to 1e-6 and the gradient of router and tokens to 1e-5, relative; padding has none."""
    router, hidden, sequences = case()
    hidden.requires_grad_()
    gates, _ = router(hidden, sequences, torch.tensor(LENGTHS), torch.tensor(SHARES))
    (0.0 * gates).sum().backward()
    weight, leaf = router.weight.detach().double().requires_grad_(), hidden.detach().double().requires_grad_()
    balance, z = twin(weight, leaf, sequences)
    (0.3 * balance + 0.7 * z).backward()
    assert hidden.grad is not None
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), leaf.grad, rtol=1e-5, atol=1e-6)
    assert not hidden.grad[sequences.flatten() == 2].any() and hidden.grad.any()
    figures = expert_figures([router], ExpertSizes(6, 2, 1), 1, lambda counted: counted)
    assert figures["experts/balance_loss"] == pytest.approx(float(balance.detach()) / sum(SHARES), rel=1e-6)
    assert figures["experts/z_loss"] == pytest.approx(float(z.detach()) / sum(SHARES), rel=1e-6)


def test_figures_count_real_tokens_alone_and_once() -> None:
    """Claim: by hand; a layer that is computed twice says the same, and what was counted is forgotten."""
    router, hidden, sequences = case()
    probs = (hidden[:, 0] @ router.weight.detach().t()).softmax(-1)
    real = sequences.flatten() < 2
    loads = torch.zeros(6).index_add(0, probs[real].topk(2, dim=-1).indices.flatten(), torch.ones(24))
    shares = (loads / 24).tolist()
    experts, losses = ExpertSizes(6, 2, 1), []
    for times in (1, 2):
        for _ in range(times):
            router(hidden, sequences, torch.tensor(LENGTHS), torch.tensor(SHARES))
        figures = expert_figures([router], experts, 1, lambda counted: counted)
        assert figures["experts/peak_load"] == pytest.approx(6 * max(shares))
        assert figures["experts/entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares if s) / math.log(6))
        assert figures["experts/idle_share"] == pytest.approx(sum(not s for s in shares) / 6)
        losses.append([figures[name] for name in ("experts/balance_loss", "experts/z_loss")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert expert_figures([router], experts, 1, lambda counted: counted) == {}
    router(hidden, sequences, torch.tensor(LENGTHS))
    assert "experts/z_loss" not in expert_figures([router], experts, 1, lambda counted: counted)
