"""Load balancing of one expert layer per tower and per sequence (Fedus et al., 2101.03961, eq. 4-6, for top-k).

Counting whole sequences, not micro-batches, makes the loss independent of how a batch or the world is split:
F * P is not linear in the tokens it is averaged over. Shape suffixes: T tokens, Q sequences, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence_sums(probs_T_E: Tensor, chosen_T_E: Tensor, sequence_T: Tensor, *, num: int) -> tuple[Tensor, Tensor]:
    """Per sequence and expert: how many of its tokens chose it, and the sum of its probabilities (both ``[num, E]``).

    ``probs_T_E`` is the softmax over the experts of the token's tower, 0 elsewhere. ``sequence_T`` numbers each token's
    sequence; tokens of number ``num`` are padding and count nowhere. Both sums add over slices of the tokens, so a
    sequence-parallel rank gives its slice and adds over the group.
    """
    chosen_T_E = chosen_T_E.to(probs_T_E.dtype)
    nothing = probs_T_E.new_zeros((num + 1, probs_T_E.shape[-1]))
    counts, prob_sums = (nothing.index_add(0, sequence_T, values) for values in (chosen_T_E, probs_T_E))
    return counts[:num], prob_sums[:num]


def load_balance_loss(
    counts_Q_E: Tensor,
    prob_sums_Q_E: Tensor,
    lengths_Q: Tensor,
    weights_Q: Tensor,
    *,
    top_k: int,
    experts_per_tower: int,
) -> Tensor:
    """``sum_q weight_q * E_t * sum_e F_qe * P_qe``: a scalar whose balanced value is the sum of the weights.

    ``F_qe`` is the share of sequence q's choices that fell on expert e, ``P_qe`` the mean probability; ``E_t`` is
    ``experts_per_tower``. Experts of another tower have F = P = 0, so a sequence's tower alone decides its term.
    A constant when ``top_k == experts_per_tower``.
    """
    lengths_Q_1 = lengths_Q.to(prob_sums_Q_E.dtype).clamp(min=1).unsqueeze(-1)
    share_Q_E = counts_Q_E / (top_k * lengths_Q_1)
    mean_prob_Q_E = prob_sums_Q_E / lengths_Q_1
    return (weights_Q * experts_per_tower * (share_Q_E * mean_prob_Q_E).sum(dim=-1)).sum()


def load_balance_weights(tower_ids: Sequence[int], *, coefficient: float, sequence_counts: Sequence[int]) -> Tensor:
    """One weight per sequence, ``coefficient / sequence_counts[tower]`` ([Q] float32).

    ``sequence_counts[k]`` counts tower k's of the whole step: the loss is the mean over each tower's sequences,
    summed over towers. Raises ValueError where a tower has sequences but a count of 0.
    """
    if any(sequence_counts[tower] <= 0 for tower in tower_ids):
        raise ValueError(f"sequences of towers {sorted(set(tower_ids))} but global counts {list(sequence_counts)}")
    return torch.tensor([coefficient / sequence_counts[tower] for tower in tower_ids], dtype=torch.float32)
