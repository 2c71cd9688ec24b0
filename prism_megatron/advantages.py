"""Group-relative advantages from the two towers' scores (docs/method.md, section 5).

``per_expert`` normalises each tower's scores in the group and mixes them; ``joint`` mixes the scores and normalises
the mixture. Shape suffix: N rollouts of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STD_EPSILON = 1e-6
INVALID_MARGIN = 1.0
ROUNDING: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
"""By the dtype that a discriminator computes in: the relative difference of scores that it does not tell apart. Equal
texts differ by less, by where in a micro-batch they stand, and dividing by their standard deviation would make
advantages of it. The head is a float32 product of what the trunk's dtype has rounded: in bfloat16 the bound is one unit
in the last place, of which the mini's scores differ by 0.42 at most (3.3e-3); in float32 they differ by 6e-7."""

AllInvalid = Literal["zero", "release"]
"""What a group without a valid rollout gets: nothing, or the released code's format penalty on every rollout."""


@dataclass(frozen=True, eq=False)
class GroupAdvantages:
    """Advantages of one group (float64 [N]) and what had to be decided for it.

    ``mixed_N`` is the advantage of a whole response. ``perception_N`` and ``reasoning_N`` are each tower's own, for
    credit per segment, with the same format penalty, so that ``mixed = alpha * perception + (1 - alpha) * reasoning``.
    Both are None for the joint form; ``reasoning_N`` is also None for a group that reasoning does not judge, and
    ``mixed_N`` is then the perception advantage.
    """

    mixed_N: Tensor
    perception_N: Tensor | None
    reasoning_N: Tensor | None
    num_valid: int
    num_clipped_scores: int
    num_flat: int
    """rewards (one per tower, or the joint one) that are the same for all rollouts, some of them valid"""

    @property
    def all_invalid(self) -> bool:
        return self.num_valid == 0


def group_normalise(scores_N: Tensor, *, rounding: float = ROUNDING[torch.float32]) -> Tensor:
    """``(s - mean) / (std + 1e-6)`` with the unbiased std; a group of one uses mean 0 and std 1.

    Scores that are equal up to ``rounding`` give 0.
    """
    if scores_N.numel() == 1:
        return scores_N / (1.0 + STD_EPSILON)
    if _all_equal(scores_N, rounding):
        return torch.zeros_like(scores_N)
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
    all_invalid: AllInvalid = "zero",
    rounding: float = ROUNDING[torch.float32],
) -> GroupAdvantages:
    """``alpha * GN(perception) + (1 - alpha) * GN(reasoning) - format_penalty * [invalid]``.

    Scores of valid rollouts are clipped to ±``score_clip``; those of invalid ones are ignored (NaN will do) and
    substituted before normalising. A group without a valid rollout has no contrast: its advantages are 0, unless
    ``all_invalid`` asks for the release's. ``reasoning_scores_N`` is None for a group without reasoning to judge.
    ``rounding`` is that of the scores (see ``ROUNDING``). Raises ValueError when a valid rollout's score is not finite.
    """
    valid_N = valid_N.bool()
    clipped, num_clipped = _clipped_scores([perception_scores_N, reasoning_scores_N], valid_N, score_clip)
    rewards = [substitute_invalid(scores_N, valid_N) for scores_N in clipped]
    own = [
        _penalised(
            group_normalise(reward_N, rounding=rounding), valid_N, penalty=format_penalty, all_invalid=all_invalid
        )
        for reward_N in rewards
    ]
    return GroupAdvantages(
        mixed_N=_mixed(own, alpha),
        perception_N=own[0],
        reasoning_N=own[1] if len(own) == 2 else None,
        num_valid=int(valid_N.sum()),
        num_clipped_scores=num_clipped,
        num_flat=sum(_is_flat(reward_N, valid_N, rounding) for reward_N in rewards),
    )


def joint_advantages(
    perception_scores_N: Tensor,
    reasoning_scores_N: Tensor | None,
    valid_N: Tensor,
    *,
    alpha: float = 0.5,
    score_clip: float = 10.0,
    format_penalty: float = 0.0,
    all_invalid: AllInvalid = "zero",
    rounding: float = ROUNDING[torch.float32],
) -> GroupAdvantages:
    """``GN(alpha * perception + (1 - alpha) * reasoning) - format_penalty * [invalid]``, the paper's form.

    Clipping, substitution (of the mixed reward) and groups without a valid rollout as ``per_expert_advantages``: what
    the paper leaves open is ours. The tower whose scores spread wider dominates. Raises as ``per_expert_advantages``.
    """
    valid_N = valid_N.bool()
    clipped, num_clipped = _clipped_scores([perception_scores_N, reasoning_scores_N], valid_N, score_clip)
    reward_N = substitute_invalid(_mixed(clipped, alpha), valid_N)
    return GroupAdvantages(
        mixed_N=_penalised(
            group_normalise(reward_N, rounding=rounding), valid_N, penalty=format_penalty, all_invalid=all_invalid
        ),
        perception_N=None,
        reasoning_N=None,
        num_valid=int(valid_N.sum()),
        num_clipped_scores=num_clipped,
        num_flat=int(_is_flat(reward_N, valid_N, rounding)),
    )


def _clipped_scores(
    scores: Sequence[Tensor | None], valid_N: Tensor, score_clip: float
) -> tuple[Sequence[Tensor], int]:
    """The given scores in float64 within ±``score_clip``, and how many of valid rollouts lay outside."""
    given = [scores_N.detach().double() for scores_N in scores if scores_N is not None]
    if not all(bool(torch.isfinite(scores_N[valid_N]).all()) for scores_N in given):
        raise ValueError("a valid rollout has a score that is not finite: the discriminator has diverged")
    outside = sum(int((scores_N[valid_N].abs() > score_clip).sum()) for scores_N in given)
    return [scores_N.clamp(-score_clip, score_clip) for scores_N in given], outside


def _mixed(towers: Sequence[Tensor], alpha: float) -> Tensor:
    return towers[0] if len(towers) == 1 else alpha * towers[0] + (1.0 - alpha) * towers[1]


def _penalised(normalised_N: Tensor, valid_N: Tensor, *, penalty: float, all_invalid: AllInvalid) -> Tensor:
    if all_invalid == "zero" and not bool(valid_N.any()):
        return torch.zeros_like(normalised_N)
    return normalised_N - penalty * (~valid_N).to(normalised_N.dtype)


def _is_flat(reward_N: Tensor, valid_N: Tensor, rounding: float) -> bool:
    return reward_N.numel() > 1 and bool(valid_N.any()) and _all_equal(reward_N, rounding)


def _all_equal(scores_N: Tensor, rounding: float) -> bool:
    """Whether the scores differ by no more than rounding."""
    return float(scores_N.max() - scores_N.min()) <= rounding * max(1.0, float(scores_N.abs().max()))
