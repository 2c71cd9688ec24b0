"""Group-relative advantages from the two towers' scores (method notes, section 4.3, form ``per_expert``).

Shape suffix: N rollouts of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STD_EPSILON = 1e-6
INVALID_MARGIN = 1.0


@dataclass(frozen=True, eq=False)
class GroupAdvantages:
    """Advantages of one group (float64 [N]) and what had to be decided for it.

    ``mixed_N`` is the advantage of a whole response. ``perception_N`` and ``reasoning_N`` are each tower's own, for
    credit per segment, with the same format penalty, so that ``mixed = alpha * perception + (1 - alpha) * reasoning``;
    ``reasoning_N`` is None for a group without reasoning scores, and then ``mixed_N`` is the perception advantage.
    """

    mixed_N: Tensor
    perception_N: Tensor
    reasoning_N: Tensor | None
    num_invalid: int
    num_clipped_scores: int
    all_invalid: bool


def group_normalise(scores_N: Tensor) -> Tensor:
    """``(s - mean) / (std + 1e-6)`` with the unbiased std; a group of one uses mean 0 and std 1."""
    if scores_N.numel() == 1:
        return scores_N / (1.0 + STD_EPSILON)
    return (scores_N - scores_N.mean()) / (scores_N.std(correction=1) + STD_EPSILON)


def substitute_invalid(scores_N: Tensor, valid_N: Tensor) -> Tensor:
    """Invalid rollouts get the group's minimum over valid ones minus 1, or -1 where none is valid."""
    worst = scores_N[valid_N].min() if bool(valid_N.any()) else scores_N.new_zeros(())
    return torch.where(valid_N, scores_N, worst - INVALID_MARGIN)


def per_expert_advantages(
    perception_scores_N: Tensor,
    reasoning_scores_N: Tensor | None,
    valid_N: Tensor,
    *,
    alpha: float = 0.5,
    score_clip: float = 10.0,
    format_penalty: float = 1.5,
) -> GroupAdvantages:
    """``alpha * GN(perception) + (1 - alpha) * GN(reasoning) - format_penalty * [invalid]``.

    Scores of valid rollouts are clipped to ±``score_clip``; those of invalid ones are ignored (NaN will do) and
    substituted before normalising. A group without a valid rollout has no contrast: its advantages are 0.
    Raises ValueError when a valid rollout's score is not finite.
    """
    valid_N = valid_N.bool()
    all_invalid = not bool(valid_N.any())
    num_clipped = 0
    own: list[Tensor] = []
    for given_N in (perception_scores_N, reasoning_scores_N):
        if given_N is None:
            continue
        scores_N = given_N.detach().double()
        if not bool(torch.isfinite(scores_N[valid_N]).all()):
            raise ValueError("a valid rollout has a score that is not finite: the discriminator has diverged")
        num_clipped += int((scores_N[valid_N].abs() > score_clip).sum())
        normalised_N = group_normalise(substitute_invalid(scores_N.clamp(-score_clip, score_clip), valid_N))
        penalised_N = normalised_N - format_penalty * (~valid_N)
        own.append(torch.zeros_like(penalised_N) if all_invalid else penalised_N)
    mixed_N = own[0] if len(own) == 1 else alpha * own[0] + (1.0 - alpha) * own[1]
    return GroupAdvantages(
        mixed_N=mixed_N,
        perception_N=own[0],
        reasoning_N=own[1] if len(own) == 2 else None,
        num_invalid=int((~valid_N).sum()),
        num_clipped_scores=num_clipped,
        all_invalid=all_invalid,
    )
