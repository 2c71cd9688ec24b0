"""Losses of one layer's router, per tower and per sequence: load balancing and the size of its logits.

Load balancing is that of Fedus et al., 2101.03961, eq. 4-6, for top-k. Counting whole sequences, not micro-batches,
makes it independent of how a batch or the world is split: F * P is not linear in the tokens it is averaged over.
Shape suffixes: T tokens, Q sequences, E experts, X values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence_sums(values_T_X: Tensor, sequence_T: Tensor, *, num: int) -> Tensor:
    """Each sequence's sum of its tokens' values, ``[num, X]``.

    ``sequence_T`` numbers each token's sequence; tokens of number ``num`` are padding and count nowhere. Sums over
    slices of the tokens add up, so a sequence-parallel rank gives its slice and adds over the group.
    """
    return values_T_X.new_zeros((num + 1, values_T_X.shape[-1])).index_add(0, sequence_T, values_T_X)[:num]


def member_sums(values_Q_X: Tensor, from_P: Tensor, to_P: Tensor, *, num: int) -> Tensor:
    """``out[k]`` is the sum of ``values[q]`` over the pairs of ``from_P`` and ``to_P`` that lead from q to k.

    With them a prompt that stands once counts in every sequence that goes on from it. ``[num]`` or ``[num, X]``.
    """
    return values_Q_X.new_zeros((num, *values_Q_X.shape[1:])).index_add(0, to_P, values_Q_X[from_P])


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

    ``counts_Q_E`` and ``prob_sums_Q_E`` are ``sequence_sums`` of the choices and of the softmax over the experts of the
    token's tower. ``F_qe`` is the share of sequence q's choices that fell on expert e, ``P_qe`` the mean probability;
    ``E_t`` is ``experts_per_tower``. Experts of another tower have F = P = 0, so a sequence's tower alone decides.
    A constant when ``top_k == experts_per_tower``.
    """
    lengths_Q_1 = lengths_Q.to(prob_sums_Q_E.dtype).clamp(min=1).unsqueeze(-1)
    share_Q_E = counts_Q_E / (top_k * lengths_Q_1)
    mean_prob_Q_E = prob_sums_Q_E / lengths_Q_1
    return (weights_Q * experts_per_tower * (share_Q_E * mean_prob_Q_E).sum(dim=-1)).sum()


def router_z_loss(masked_T_E: Tensor, weights_T: Tensor) -> Tensor:
    """``sum_t weight_t * logsumexp(logits_t)^2``, a scalar that adds over tokens (Zoph et al., 2202.08906, eq. 5).

    ``masked_T_E`` are logits with minus infinity for experts of other towers.
    """
    return (weights_T * masked_T_E.logsumexp(dim=-1).square()).sum()


def sequence_shares(tower_ids: Sequence[int], *, sequence_counts: Sequence[int]) -> Tensor:
    """What a sequence counts in the mean over its tower's: ``1 / sequence_counts[tower]`` ([Q] float32).

    ``sequence_counts[k]`` counts tower k's of the whole step. A loss weighed by a coefficient times these is the mean
    over each tower's sequences, summed over towers. Raises ValueError where a tower has sequences but a count of 0.
    """
    if any(sequence_counts[tower] <= 0 for tower in tower_ids):
        raise ValueError(f"sequences of towers {sorted(set(tower_ids))} but global counts {list(sequence_counts)}")
    return torch.tensor([1.0 / sequence_counts[tower] for tower in tower_ids], dtype=torch.float32)


def merge_towers(
    tower_ids_Q: Tensor, lengths_Q: Tensor, weights_Q: Tensor, *, num_towers: int
) -> tuple[Tensor, Tensor]:
    """Length and weight of all of a micro-batch's sequences of a tower as one, ``[num_towers]`` each.

    With them ``load_balance_loss`` averages F and P over the tokens of the micro-batch. That is the Switch form, here
    per layer, while the release pools layers; a micro-batch weighs as much as it has of the step's sequences, which is
    their plain mean, as released, where all have equally many.
    """
    lengths_K = lengths_Q.new_zeros(num_towers).index_add(0, tower_ids_Q, lengths_Q)
    return lengths_K, weights_Q.new_zeros(num_towers).index_add(0, tower_ids_Q, weights_Q)
