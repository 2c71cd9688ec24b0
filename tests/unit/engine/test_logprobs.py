"""Log-probs and entropies of one rank, in chunks that do not divide the tokens.

``tests/distributed/test_logprobs.py`` has vocabularies that are split over ranks.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from prism_megatron.engine import logprobs
from prism_megatron.engine.runtime import World


@pytest.mark.parametrize("chunk", [1, 3, 5, 7, 100])
def test_equals_log_softmax_in_float64(world: World, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Claim: values and gradients to 1e-5, however many of 7 tokens go into a chunk; temperature and padding count."""
    tokens, rows, vocab, padded, temperature = 7, 2, 11, 16, 0.6
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk * rows * padded)
    logits = (4 * torch.randn(tokens, rows, padded)).requires_grad_()
    targets = torch.randint(vocab, (rows, tokens))
    weights = torch.randn(2, rows, tokens)
    found = logprobs.vocab_parallel_scores(
        logits, targets, tp_group=world.groups.tp, vocab_size=vocab, temperature=temperature
    )
    table = functional.log_softmax(logits.double()[..., :vocab] / temperature, dim=-1).transpose(0, 1)
    expected = table.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(table.exp() * table).sum(-1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    gradients = [
        torch.autograd.grad(sum(w * x for w, x in zip(weights, pair, strict=True)).sum(), logits)[0]
        for pair in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
