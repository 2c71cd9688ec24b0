"""The load-balancing loss against a slow float64 twin, and its splitting properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_megatron.losses.load_balance import (
    load_balance_loss,
    merge_towers,
    router_z_loss,
    sequence_shares,
    sequence_sums,
)

SEQUENCE, ROWS, EXPERTS, TOP_K = 6, 4, 8, 2
TOWERS = [0, 1, 1, 0]
PER_TOWER = EXPERTS // 2


def routed(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens in random order: probabilities inside each one's tower, choices, its sequence (ROWS: padding), lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, SEQUENCE + 1, (ROWS,), generator=generator)
    slots = torch.arange(ROWS).repeat_interleave(SEQUENCE)
    real = torch.arange(SEQUENCE).repeat(ROWS) < lengths[slots]
    logits = torch.randn(len(slots), EXPERTS, generator=generator, dtype=torch.float64)
    allowed = torch.arange(EXPERTS) % 2 == torch.tensor(TOWERS)[slots].unsqueeze(-1)
    probs = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, probs.topk(TOP_K).indices, value=True)
    order = torch.randperm(len(slots), generator=generator)
    return probs[order], chosen[order], slots.where(real, ROWS)[order], lengths


def loss_of(probs: Tensor, chosen: Tensor, sequence: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    counts, sums = (sequence_sums(x, sequence, num=len(lengths)) for x in (chosen.to(probs.dtype), probs))
    return load_balance_loss(counts, sums, lengths, weights, top_k=TOP_K, experts_per_tower=PER_TOWER)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_equals_a_loop_over_sequences(seed: int) -> None:
    """Mean over each tower's sequences of E_t * sum_e F_e P_e, summed over towers, to 1e-7 (weights are fp32)."""
    probs, chosen, sequence, lengths = routed(seed)
    weights = 0.5 * sequence_shares(TOWERS, sequence_counts=[2, 2])
    expected = 0.0
    for q, tower in enumerate(TOWERS):
        length = int(lengths[q])
        tokens = [t for t, number in enumerate(sequence.tolist()) if number == q]
        assert len(tokens) == length
        for expert in range(tower, EXPERTS, 2):
            share = sum(bool(chosen[t, expert]) for t in tokens) / (TOP_K * length)
            mean_prob = sum(float(probs[t, expert]) for t in tokens) / length
            expected += 0.5 / 2 * PER_TOWER * share * mean_prob
    assert float(loss_of(probs, chosen, sequence, lengths, weights)) == pytest.approx(expected, abs=1e-7)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, ROWS - 1), st.integers(1, SEQUENCE * ROWS - 1))
def test_splitting_sequences_or_tokens_changes_nothing(seed: int, cut: int, token_cut: int) -> None:
    """Micro-batches add up, and sums over slices of the tokens add up, to 1e-12."""
    probs, chosen, sequence, lengths = routed(seed)
    weights = sequence_shares(TOWERS, sequence_counts=[2, 2]).double()
    whole = float(loss_of(probs, chosen, sequence, lengths, weights))
    by_batch = 0.0
    for first, last in ((0, cut), (cut, ROWS)):
        inside = (sequence >= first) & (sequence < last)
        number = (sequence - first).where(inside, last - first)
        by_batch += float(loss_of(probs, chosen, number, lengths[first:last], weights[first:last]))
    counts, sums = (
        sequence_sums(x[:token_cut], sequence[:token_cut], num=ROWS)
        + sequence_sums(x[token_cut:], sequence[token_cut:], num=ROWS)
        for x in (chosen.to(probs.dtype), probs)
    )
    by_token = float(load_balance_loss(counts, sums, lengths, weights, top_k=TOP_K, experts_per_tower=PER_TOWER))
    assert by_batch == pytest.approx(whole, abs=1e-12)
    assert by_token == pytest.approx(whole, abs=1e-12)


def test_balanced_routing_gives_the_sum_of_the_weights_and_padding_counts_nowhere() -> None:
    """Uniform probabilities and choices give weight 1 per sequence, whatever stands in the padding."""
    probs = torch.zeros(4, 4)
    probs[:2, [0, 2]] = 0.5
    probs[2:, 0] = 1.0
    chosen = torch.zeros(4, 4, dtype=torch.bool)
    chosen[0, 0] = chosen[1, 2] = chosen[2:, 0] = True
    sequence = torch.tensor([0, 0, 1, 1])
    loss = load_balance_loss(
        sequence_sums(chosen.float(), sequence, num=1),
        sequence_sums(probs, sequence, num=1),
        torch.tensor([2]),
        torch.tensor([1.0]),
        top_k=1,
        experts_per_tower=2,
    )
    assert loss.item() == pytest.approx(1.0)


def test_the_z_loss_is_the_weighted_sum_over_tokens() -> None:
    """Hand-made: two experts of one tower with logits log 1 and log 3, and one alone with logit 5."""
    masked = torch.tensor([[0.0, -torch.inf, math.log(3.0)], [-torch.inf, 5.0, -torch.inf]])
    loss = router_z_loss(masked, torch.tensor([0.5, 2.0]))
    assert loss.item() == pytest.approx(0.5 * math.log(4.0) ** 2 + 2 * 25)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_merged_towers_are_one_sequence_of_all_their_tokens(seed: int) -> None:
    """Claim: the micro-batch form equals a loop over each tower's tokens, weighing the sum of their weights (to 1e-6).

    It differs from the form by sequence, or the scope would be a flag that does nothing.
    """
    probs, chosen, sequence, lengths = routed(seed)
    towers = torch.tensor(TOWERS)
    weights = sequence_shares(TOWERS, sequence_counts=[2, 4])
    merged_lengths, merged = merge_towers(towers, lengths, weights, num_towers=2)
    of_token = torch.cat([towers, torch.tensor([2])])[sequence]
    expected = 0.0
    for tower, weight in enumerate((1.0, 0.5)):
        mine = of_token == tower
        share, mean_prob = chosen[mine].double().mean(0) / TOP_K, probs[mine].mean(0)
        expected += weight * PER_TOWER * float((share * mean_prob).sum())
    found = float(loss_of(probs, chosen, of_token, merged_lengths, merged))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != pytest.approx(float(loss_of(probs, chosen, sequence, lengths, weights)), abs=1e-4)


def test_a_tower_with_sequences_needs_a_count() -> None:
    """A global count that leaves out a tower present in the batch is refused."""
    with pytest.raises(ValueError, match="global counts"):
        sequence_shares([0, 1], sequence_counts=[2, 0])


def test_a_tower_that_has_no_token_here_adds_nothing() -> None:
    """A micro-batch of one tower's sequences, merged by tower: the other one's length is 0, its loss too, not NaN."""
    towers, lengths = torch.tensor([1, 1]), torch.tensor([2, 3])
    merged_lengths, weights = merge_towers(towers, lengths, torch.tensor([0.5, 0.25]), num_towers=2)
    assert (merged_lengths.tolist(), weights.tolist()) == ([0, 5], [0.0, 0.75])
    counts, sums = torch.tensor([[0.0, 0.0], [4.0, 1.0]]), torch.tensor([[0.0, 0.0], [3.0, 2.0]])
    loss = load_balance_loss(counts, sums, merged_lengths, weights, top_k=1, experts_per_tower=2)
    assert loss.item() == pytest.approx(0.75 * 2 * (4 / 5 * 3 / 5 + 1 / 5 * 2 / 5))
