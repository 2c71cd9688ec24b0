"""Bradley-Terry and the score regulariser against a slow float64 twin, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prism_megatron.losses.discriminator import PairRows, bradley_terry_loss, discriminator_loss, pair_sums

COEFFICIENT = 0.001


def game(seed: int, rollouts: tuple[int, int]) -> tuple[Tensor, PairRows]:
    """One prompt: per tower a reference row, then that many rollout rows."""
    reference_row: list[int] = []
    towers: list[int] = []
    for tower, count in enumerate(rollouts):
        reference_row += [len(towers)] * (count + 1)
        towers += [tower] * (count + 1)
    rows = torch.tensor(reference_row)
    is_rollout = rows != torch.arange(len(rows))
    generator = torch.Generator().manual_seed(seed)
    scores = 4.0 * torch.randn(len(rows), generator=generator, dtype=torch.float64)
    return scores, PairRows(rows, is_rollout, torch.tensor(towers))


def join(one: tuple[Tensor, PairRows], two: tuple[Tensor, PairRows]) -> tuple[Tensor, PairRows]:
    (scores_1, rows_1), (scores_2, rows_2) = one, two
    return torch.cat([scores_1, scores_2]), PairRows(
        torch.cat([rows_1.reference_row_B, rows_2.reference_row_B + len(scores_1)]),
        torch.cat([rows_1.is_rollout_B, rows_2.is_rollout_B]),
        torch.cat([rows_1.tower_ids_B, rows_2.tower_ids_B]),
    )


def slow_loss(scores: Tensor, rows: PairRows, counts: tuple[int, int]) -> float:
    """Method notes 4.4, written out pair by pair."""
    pair_losses = [0.0, 0.0]
    squares = [[0.0, 0.0], [0.0, 0.0]]
    for b in range(len(scores)):
        if rows.is_rollout_B[b]:
            tower = int(rows.tower_ids_B[b])
            reference, rollout = float(scores[rows.reference_row_B[b]]), float(scores[b])
            pair_losses[tower] += math.log1p(math.exp(rollout - reference)) / counts[tower]
            squares[tower][0] += reference**2 / counts[tower]
            squares[tower][1] += rollout**2 / counts[tower]
    terms = [square for tower in (0, 1) if counts[tower] for square in squares[tower]]
    return sum(pair_losses) + COEFFICIENT * (sum(terms) / len(terms) if terms else 0.0)


counts_strategy = st.tuples(st.integers(0, 4), st.integers(0, 4))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), counts_strategy)
def test_equals_a_loop_over_pairs(seed: int, rollouts: tuple[int, int]) -> None:
    """Two Bradley-Terry terms plus the four-term regulariser, to 1e-12; towers without pairs are left out."""
    scores, rows = game(seed, rollouts)
    result = discriminator_loss(scores, rows, pair_counts=rollouts, regulariser_coefficient=COEFFICIENT)
    assert result.loss.item() == pytest.approx(slow_loss(scores, rows, rollouts), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), counts_strategy, counts_strategy)
def test_splitting_groups_changes_neither_loss_nor_gradient(
    seed: int, first: tuple[int, int], second: tuple[int, int]
) -> None:
    """Two micro-batches with the global pair counts add up to one, to 1e-12, also when one has no pair."""
    one, two = game(seed, first), game(seed + 1, second)
    counts = (first[0] + second[0], first[1] + second[1])
    whole_scores, whole_rows = join(one, two)
    whole_scores.requires_grad_(True)
    whole = discriminator_loss(whole_scores, whole_rows, pair_counts=counts)
    whole.loss.backward()
    parts = [scores.clone().requires_grad_(True) for scores, _ in (one, two)]
    losses = [
        discriminator_loss(scores, rows, pair_counts=counts).loss
        for scores, (_, rows) in zip(parts, (one, two), strict=True)
    ]
    for loss in losses:
        loss.backward()
    assert sum(loss.item() for loss in losses) == pytest.approx(whole.loss.item(), abs=1e-12)
    torch.testing.assert_close(
        torch.cat([part.grad for part in parts if part.grad is not None]), whole_scores.grad, rtol=0, atol=1e-12
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(-50, 50))
def test_bradley_terry_ignores_a_shift_of_a_tower(seed: int, shift: float) -> None:
    """Adding a constant to all scores of a tower leaves the pair losses as they are, to 1e-10."""
    scores, rows = game(seed, (3, 2))
    shifted = scores + shift * (rows.tower_ids_B == 0)
    before = discriminator_loss(scores, rows, pair_counts=(3, 2), regulariser_coefficient=0.0).loss
    after = discriminator_loss(shifted, rows, pair_counts=(3, 2), regulariser_coefficient=0.0).loss
    assert float(after) == pytest.approx(float(before), abs=1e-10)


def test_a_saturated_discriminator_can_come_back() -> None:
    """Beyond the advantage's clip of 10 the regulariser and a wrongly ranked pair still have their gradient."""
    _, rows = game(0, (1, 0))
    scores = torch.tensor([-40.0, 60.0, 0.0], dtype=torch.float64, requires_grad=True)
    discriminator_loss(scores, rows, pair_counts=(1, 0), regulariser_coefficient=COEFFICIENT).loss.backward()
    expected = [-1.0 + COEFFICIENT * 2 * -40.0 / 2, 1.0 + COEFFICIENT * 2 * 60.0 / 2, 0.0]
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_no_pair_anywhere_is_zero_with_a_graph() -> None:
    """References alone: loss 0, zero gradient, nothing made up; the metric sums are all 0."""
    scores, rows = game(0, (0, 0))
    scores.requires_grad_(True)
    result = discriminator_loss(scores, rows, pair_counts=(0, 0))
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert scores.grad is not None
    assert not bool(scores.grad.any())
    assert all(float(value) == 0.0 for value in pair_sums(scores, rows, tower=0).values())


def test_pair_sums_count_wins_and_ties() -> None:
    """Scores 2 (reference) against 1, 2, 4: one win, one tie of a half, one loss; margins 1, 0 and -2."""
    _, rows = game(0, (3, 0))
    scores = torch.tensor([2.0, 1.0, 2.0, 4.0, 9.0])
    sums = {name: float(value) for name, value in pair_sums(scores, rows, tower=0).items()}
    assert sums == {"pairs": 3, "correct": 1.5, "margin": -1, "reference_score": 6, "rollout_score": 7}


def test_bradley_terry_of_a_long_margin_is_finite() -> None:
    """A margin of ±1e4 gives a finite loss and gradient."""
    reference = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry_loss(reference, torch.zeros(2), torch.ones(2, dtype=torch.bool), pair_count=2)
    loss.backward()
    assert loss.item() == pytest.approx(5e3)
    assert reference.grad is not None
    assert bool(torch.isfinite(reference.grad).all())
