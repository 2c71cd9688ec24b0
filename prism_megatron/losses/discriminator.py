"""Bradley-Terry pairs per segment and the score regulariser (docs/method.md, section 6).

A discriminator micro-batch has one row per (answer, segment). Every rollout row names the row of its group's
reference; together they are a pair. Shape suffixes: B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from prism_megatron.losses.reduction import global_mean, masked_sum


@dataclass(frozen=True, eq=False)
class PairRows:
    """Which rows are compared: ``reference_row_B`` int64 row indices, ``is_rollout_B`` bool, ``tower_ids_B`` int64.

    Example: rows (reference, rollout, rollout) of one tower are ``reference_row_B = [0, 0, 0]``,
    ``is_rollout_B = [False, True, True]``, ``tower_ids_B = [0, 0, 0]``.
    """

    reference_row_B: Tensor
    is_rollout_B: Tensor
    tower_ids_B: Tensor

    def of_tower(self, tower: int) -> Tensor:
        """Rollout rows of one tower: a bool mask [B] with one true per pair."""
        return self.is_rollout_B.bool() & (self.tower_ids_B == tower)


@dataclass(frozen=True, eq=False)
class DiscriminatorLoss:
    """``loss`` is this micro-batch's share of the step's loss; its parts are detached (one per tower)."""

    loss: Tensor
    pair_losses: tuple[Tensor, ...]
    regulariser: Tensor


def bradley_terry_loss(reference_B: Tensor, rollout_B: Tensor, pair_mask_B: Tensor, *, pair_count: float) -> Tensor:
    """``sum(-log sigmoid(reference - rollout)) / pair_count`` over the masked rows (scalar).

    ``pair_count`` counts this segment's valid pairs of the whole step; with none anywhere the loss is 0.
    Scores are not clamped: a pair ranked wrongly by a wide margin is the one that needs a gradient.
    """
    return global_mean(-functional.logsigmoid(reference_B - rollout_B), pair_mask_B, denominator=pair_count)


def discriminator_loss(
    scores_B: Tensor, rows: PairRows, *, pair_counts: Sequence[float], regulariser_coefficient: float = 0.001
) -> DiscriminatorLoss:
    """``sum_k L_k + coefficient * L_reg`` with one Bradley-Terry term per tower k.

    ``scores_B`` are unclipped, as the head gives them. ``L_reg`` is the mean over the terms reference and rollout of
    each tower (four with two towers) of the mean squared score over that term's valid pairs; a tower without pairs
    in the whole step has no terms. ``pair_counts[k]`` counts tower k's valid pairs of the whole step.
    """
    reference_B = scores_B[rows.reference_row_B]
    num_terms = 2 * sum(count > 0 for count in pair_counts)
    pair_losses = []
    regulariser = masked_sum(scores_B, torch.zeros_like(scores_B, dtype=torch.bool))
    for tower, pair_count in enumerate(pair_counts):
        pairs_B = rows.of_tower(tower)
        pair_losses.append(bradley_terry_loss(reference_B, scores_B, pairs_B, pair_count=pair_count))
        squares_B = reference_B.square() + scores_B.square()
        regulariser = regulariser + global_mean(squares_B, pairs_B, denominator=pair_count) / max(num_terms, 1)
    loss = torch.stack(pair_losses).sum() + regulariser_coefficient * regulariser
    return DiscriminatorLoss(loss, tuple(part.detach() for part in pair_losses), regulariser.detach())


def pair_sums(scores_B: Tensor, rows: PairRows, *, tower: int) -> Mapping[str, Tensor]:
    """What the metrics of one tower add up over micro-batches and ranks (detached scalars).

    ``pairs``; ``correct``, where a tie counts one half; ``margin`` (reference - rollout); ``reference_score`` and
    ``rollout_score``, each once per pair.
    """
    scores_B = scores_B.detach()
    reference_B = scores_B[rows.reference_row_B]
    margin_B = reference_B - scores_B
    pairs_B = rows.of_tower(tower)
    return {
        "pairs": pairs_B.to(scores_B.dtype).sum(),
        "correct": masked_sum((margin_B.sign() + 1.0) / 2.0, pairs_B),
        "margin": masked_sum(margin_B, pairs_B),
        "reference_score": masked_sum(reference_B, pairs_B),
        "rollout_score": masked_sum(scores_B, pairs_B),
    }
