"""Routing maths without a model, and how a loss is attached."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model_providers.moe_discriminator.model import keyed_dropout
from model_providers.moe_discriminator.routing import choose_experts, mask_other_towers
from prism_megatron.engine.batch import collate, token_sequences
from prism_megatron.engine.layers.experts import AttachLoss
from prism_megatron.types import TokenSequence


def test_gates_are_the_renormalised_softmax_of_the_tokens_tower() -> None:
    """Gates equal softmax over the tower, best k kept and divided by their sum, to 1e-6; other experts get 0."""
    torch.manual_seed(0)
    logits = torch.randn(15, 8)
    towers = torch.arange(15) // 2 % 2
    gates, chosen = choose_experts(mask_other_towers(logits, towers, 2), 2)
    for token, tower in enumerate(towers.tolist()):
        probs = logits[token, tower::2].softmax(-1)
        best = probs.topk(2).indices
        kept = torch.zeros_like(probs).scatter(-1, best, probs[best])
        torch.testing.assert_close(gates[token, tower::2], kept / kept.sum())
        assert not bool(chosen[token, 1 - tower :: 2].any())
    assert bool((chosen.sum(-1) == 2).all())


def test_extreme_logits_never_pick_the_other_tower() -> None:
    """A tower whose probabilities underflow to 0 is still preferred to a masked expert, and gates still sum to 1."""
    logits = torch.tensor([[0.0, 9e4, -9e4, 9e4]])
    gates, chosen = choose_experts(mask_other_towers(logits, torch.tensor([0]), 2), 2)
    assert chosen.flatten().tolist() == [True, False, True, False]
    assert float(gates.sum()) == 1.0


def test_one_tower_is_one_pool() -> None:
    """With a single tower the segment that a token stands in does not matter."""
    logits = torch.randn(4, 6)
    assert torch.equal(mask_other_towers(logits, torch.tensor([0, 1, 1, 0]), 1), logits)


@pytest.mark.parametrize("pack", [False, True])
def test_every_token_knows_its_sequence_and_padding_is_told_apart(pack: bool) -> None:
    """Claim: held against the slots and lengths, token by token, for shares of a row in any order."""
    rows = [TokenSequence(tuple(range(1, length + 1))) for length in (3, 5, 4)]
    batch = collate(rows, pad_token_id=0, multiple_of=4, device=torch.device("cpu"), pack=pack)
    tokens = np.random.default_rng(0).permutation(batch.input_ids_B_S.shape[1])
    slots, is_real = token_sequences(batch, tokens)
    assert slots.shape == is_real.shape == (len(tokens), len(batch.input_ids_B_S))
    for i, token in enumerate(tokens):
        for row in range(slots.shape[1]):
            q = int(slots[i, row])
            of_row, start = batch.places()[q]
            assert of_row == row and start <= token < start + batch.slots[q]
            assert is_real[i, row] == (int(batch.host_ids_B_S[row, token]) != 0)


def test_attached_loss_gets_a_gradient_of_one() -> None:
    """Values pass unchanged; gradients are those of (use of values) + loss."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    out: Tensor = AttachLoss.apply(3.0 * x, (x**2).sum())  # type: ignore[no-untyped-call]
    assert torch.equal(out, 3.0 * x)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [5.0, 7.0]


def test_dropout_depends_on_the_key_alone() -> None:
    """A row's mask does not change with its place in the batch; kept values are scaled by 1 / (1 - rate)."""
    hidden = torch.ones(3, 4096)
    keys = np.array([2**62 + 1, 5, 2**62])
    dropped = keyed_dropout(hidden, keys, 0.25)
    again = keyed_dropout(hidden[:1], keys[2:], 0.25)
    assert torch.equal(dropped[2], again[0])
    assert not torch.equal(dropped[0], dropped[2])  # keys that a float would have made equal
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_float_keys_are_refused() -> None:
    """Keys that went through an array of floats have lost their low bits."""
    with pytest.raises(TypeError, match="int64"):
        keyed_dropout(torch.ones(1, 4), np.array([1.0]), 0.1)
