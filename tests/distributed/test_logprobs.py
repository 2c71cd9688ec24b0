"""Vocabulary-parallel log-probs and entropies against log_softmax in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine import logprobs
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld

VOCAB, PADDED, TOKENS, ROWS = 21, 32, 7, 3


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


class Sharded(NamedTuple):
    """What a rank found."""

    logprobs: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


def _case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(TOKENS, ROWS, PADDED, generator=generator) * 6.0
    targets = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
    weights, entropy_weights = torch.randn(2, ROWS, TOKENS, generator=generator)
    return logits, targets, weights, entropy_weights


def _twin(temperature: float, loss_of: str) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the logits' gradient of a weighted sum: float64 log_softmax over the real columns."""
    logits, targets, *weights = _case()
    leaf = logits.double().requires_grad_()
    table = torch.log_softmax(leaf[..., :VOCAB] / temperature, dim=-1).transpose(0, 1)
    picked = table.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(table.exp() * table).sum(-1)
    _loss(picked, entropy, weights, loss_of).backward()
    assert leaf.grad is not None
    return picked.detach(), entropy.detach(), leaf.grad


def _loss(logprobs_B_L: Tensor, entropy_B_L: Tensor, weights: list[Tensor], loss_of: str) -> Tensor:
    parts = {"logprobs": (logprobs_B_L * weights[0]).sum(), "entropy": (entropy_B_L * weights[1]).sum()}
    return sum((part for name, part in parts.items() if loss_of in {name, "both"}), torch.tensor(0.0))


def sharded(world: World, temperature: float, chunk_elements: int, loss_of: str, learns: bool) -> Sharded:
    """Hidden states are the logits, and the output layer is the identity, whose gradient is the outer product's."""
    logprobs._CHUNK_ELEMENTS = chunk_elements
    logits, targets, *weights = _case()
    width = PADDED // world.parallel.tp
    hidden = logits.clone().requires_grad_()
    weight = torch.eye(PADDED)[world.tp_rank * width : (world.tp_rank + 1) * width].requires_grad_()
    output = logprobs.VocabularyOutput(hidden, weight, world.groups.tp, VOCAB)
    everywhere = logprobs.places_of(torch.ones_like(targets))
    if learns:
        loss, result = output.learn(
            lambda logprobs_n, entropy_n, of: _loss(logprobs_n, entropy_n, [of(one) for one in weights], loss_of),
            targets, everywhere, temperature=temperature,
        )  # fmt: skip
    else:
        result = output.scores(targets, everywhere, temperature=temperature)
        loss = _loss(*result, weights, loss_of)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Sharded(result.logprobs_B_L.detach(), result.entropy_B_L.detach(), hidden.grad, weight.grad)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [100, 2**22])
@pytest.mark.parametrize("loss_of", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("learns", [False, True])
def test_equals_log_softmax_in_float64(
    *, gloo: GlooWorld, tp: int, temperature: float, chunk_elements: int, loss_of: str, learns: bool
) -> None:
    """Claim: values and gradients are those of log_softmax over the real vocabulary, whatever TP and chunk size.

    At TP4 the last rank holds padding columns only. Tolerance: 2e-6 absolute, fp32 against float64
    (scaled logits reach 30, where fp32 resolves 2e-6); for gradients 1e-5, since a token's weight of up to 3 and
    1 / 0.7 multiply that.
    """
    expected, expected_entropy, expected_grad = _twin(temperature, loss_of)
    parts = gloo.run(
        sharded, temperature, chunk_elements, loss_of, learns, num_ranks=tp, parallel=ParallelConfig(tp=tp)
    )
    for part in parts:
        torch.testing.assert_close(part.logprobs.double(), expected, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(part.entropy.double(), expected_entropy, rtol=1e-6, atol=2e-6)
    grad = sum(part.hidden_grad for part in parts)  # each rank has its part of the sum
    assert isinstance(grad, Tensor)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-6, atol=1e-5)
    assert grad[..., VOCAB:].abs().max() == 0.0
    hidden = _case()[0].double().flatten(0, 1)
    weight_grad = torch.cat([part.weight_grad for part in parts])
    torch.testing.assert_close(weight_grad.double(), expected_grad.flatten(0, 1).t() @ hidden, rtol=1e-5, atol=1e-4)
    assert weight_grad[VOCAB:].abs().max() == 0.0
