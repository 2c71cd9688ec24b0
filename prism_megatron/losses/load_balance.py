"""Load balancing of one expert layer per tower and per sequence (Fedus et al., 2101.03961, eq. 4-6, for top-k).

Counting whole sequences, not micro-batches, makes the loss independent of how a batch or the world is split:
F * P is not linear in the tokens it is averaged over. Shape suffixes: S tokens, B rows, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence_sums(probs_S_B_E: Tensor, chosen_S_B_E: Tensor, real_S_B: Tensor) -> tuple[Tensor, Tensor]:
    """Per sequence and expert: how many real tokens chose it, and the sum of its probabilities (both [B, E]).

    ``probs_S_B_E`` is the softmax over the experts of the row's tower, 0 elsewhere. Padding counts nowhere. Both
    sums add over slices of the sequence, so a sequence-parallel rank gives its slice and adds over the group.
    """
    real_S_B_1 = real_S_B.unsqueeze(-1)
    counts_B_E = (chosen_S_B_E & real_S_B_1).to(probs_S_B_E.dtype).sum(dim=0)
    prob_sums_B_E = (probs_S_B_E * real_S_B_1).sum(dim=0)
    return counts_B_E, prob_sums_B_E


def load_balance_loss(
    counts_B_E: Tensor,
    prob_sums_B_E: Tensor,
    lengths_B: Tensor,
    weights_B: Tensor,
    *,
    top_k: int,
    experts_per_tower: int,
) -> Tensor:
    """``sum_b weight_b * E_t * sum_e F_be * P_be``: a scalar whose balanced value is the sum of the weights.

    ``F_be`` is the share of sequence b's choices that fell on expert e, ``P_be`` the mean probability; ``E_t`` is
    ``experts_per_tower``. Experts of another tower have F = P = 0, so a row's tower alone decides its term.
    A constant when ``top_k == experts_per_tower``.
    """
    lengths_B_1 = lengths_B.to(prob_sums_B_E.dtype).clamp(min=1).unsqueeze(-1)
    share_B_E = counts_B_E / (top_k * lengths_B_1)
    mean_prob_B_E = prob_sums_B_E / lengths_B_1
    return (weights_B * experts_per_tower * (share_B_E * mean_prob_B_E).sum(dim=-1)).sum()


def load_balance_weights(tower_ids: Sequence[int], *, coefficient: float, sequence_counts: Sequence[int]) -> Tensor:
    """One weight per row, ``coefficient / sequence_counts[tower]`` ([B] float32).

    ``sequence_counts[k]`` counts tower k's rows of the whole step: the loss is the mean over each tower's sequences,
    summed over towers. Raises ValueError where a tower has rows but a count of 0.
    """
    if any(sequence_counts[tower] <= 0 for tower in tower_ids):
        raise ValueError(f"rows of towers {sorted(set(tower_ids))} but global sequence counts {list(sequence_counts)}")
    return torch.tensor([coefficient / sequence_counts[tower] for tower in tower_ids], dtype=torch.float32)
