"""Vocabulary-parallel log-probs against log_softmax in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.engine import logprobs
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld

VOCAB, PADDED, TOKENS, ROWS = 21, 32, 7, 3


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def _case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(TOKENS, ROWS, PADDED, generator=generator) * 6.0
    targets = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
    weights = torch.randn(ROWS, TOKENS, generator=generator)
    return logits, targets, weights


def _twin(temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and the logits' gradient of a weighted sum, from float64 log_softmax over the real columns."""
    logits, targets, weights = _case()
    leaf = logits.double().requires_grad_()
    table = torch.log_softmax(leaf[..., :VOCAB] / temperature, dim=-1).transpose(0, 1)
    picked = table.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    (picked * weights).sum().backward()
    assert leaf.grad is not None
    return picked.detach(), leaf.grad


def sharded(world: World, temperature: float, chunk_elements: int) -> tuple[Tensor, Tensor]:
    logprobs._CHUNK_ELEMENTS = chunk_elements
    logits, targets, weights = _case()
    width = PADDED // world.parallel.tp
    leaf = logits[..., world.tp_rank * width : (world.tp_rank + 1) * width].clone().requires_grad_()
    result = logprobs.vocab_parallel_logprobs(
        leaf, targets, tp_group=world.groups.tp, vocab_size=VOCAB, temperature=temperature
    )
    (result * weights).sum().backward()
    assert leaf.grad is not None
    return result.detach(), leaf.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [1, 2**22])
def test_equals_log_softmax_in_float64(gloo: GlooWorld, tp: int, temperature: float, chunk_elements: int) -> None:
    """Claim: values and gradients are those of log_softmax over the real vocabulary, whatever TP and chunk size.

    At TP4 the last rank holds padding columns only. Tolerance: 2e-6 absolute, fp32 against float64.
    """
    expected, expected_grad = _twin(temperature)
    parts = gloo.run(sharded, temperature, chunk_elements, num_ranks=tp, parallel=ParallelConfig(tp=tp))
    for values, _ in parts:
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=2e-6)
    grad = torch.cat([grad for _, grad in parts], dim=-1)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-6, atol=2e-6)
    assert grad[..., VOCAB:].abs().max() == 0.0
