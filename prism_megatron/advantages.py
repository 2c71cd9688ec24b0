"""Group-relative advantages, from the two towers' scores (docs/method.md, section 5) and from rewards.

``per_expert`` normalises each tower's scores in the group and mixes them; ``joint`` mixes the scores and normalises
the mixture. Rewards are normalised in the group, with its standard deviation or without, or each for itself (GDPO): see
docs/algorithms.md. Shape suffixes: N rollouts of one prompt, K rewards of each.
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


def group_centred(rewards_N: Tensor, *, rounding: float = ROUNDING[torch.float32]) -> Tensor:
    """``r - mean``: Dr. GRPO (2503.20783) and MiniRL (2512.01374) do not divide by the standard deviation.

    A group of one has no contrast, nor has one whose rewards are equal up to ``rounding``: both give 0.
    """
    if rewards_N.numel() == 1 or _all_equal(rewards_N, rounding):
        return torch.zeros_like(rewards_N)
    return rewards_N - rewards_N.mean()


def gdpo_advantages(
    rewards_of_groups: Sequence[Tensor], weights_K: Sequence[float], *, rounding: float = ROUNDING[torch.float32]
) -> list[Tensor]:
    """``[N]`` of each group from its ``[K, N]``: ``sum_k w_k GN(r_k)``, whitened over all rollouts of the batch.

    GDPO (2601.05242): rewards that are normalised together would give the same advantage to different mixtures of them.
    GN is :func:`group_normalise`; whitening takes the batch's mean and divides by its unbiased standard deviation +
    1e-6. A group of one has no contrast. A batch whose sums are all equal up to ``rounding`` gives 0.
    """
    mixed = []
    for rewards_K_N in rewards_of_groups:
        parts = [
            weight * (group_normalise(reward_N, rounding=rounding) if reward_N.numel() > 1 else 0.0 * reward_N)
            for weight, reward_N in zip(weights_K, rewards_K_N, strict=True)
        ]
        mixed.append(torch.stack(parts).sum(0))
    whole = torch.cat(mixed)
    if whole.numel() == 1 or _all_equal(whole, rounding):
        return [torch.zeros_like(one) for one in mixed]
    return [(one - whole.mean()) / (whole.std(correction=1) + STD_EPSILON) for one in mixed]


def reward_advantages(
    rewards_of_groups: Sequence[Tensor],
    weights_K: Sequence[float],
    *,
    form: Literal["group", "group-mean", "gdpo"],
    rounding: float = ROUNDING[torch.float32],
) -> list[Tensor]:
    """``[N]`` of each group from its ``[K, N]``, in float64.

    ``group`` normalises the weighted sum of rewards in the group (GRPO, 2402.03300), ``group-mean`` takes only the
    group's mean from it, ``gdpo`` is :func:`gdpo_advantages`. Raises ValueError for a reward that is not finite.
    """
    given = [rewards_K_N.detach().double() for rewards_K_N in rewards_of_groups]
    if not all(bool(torch.isfinite(one).all()) for one in given):
        raise ValueError("a rollout has a reward that is not finite")
    if form == "gdpo":
        return gdpo_advantages(given, weights_K, rounding=rounding)
    of_group = group_normalise if form == "group" else group_centred
    weights = torch.tensor(list(weights_K), dtype=torch.float64)
    return [of_group(weights @ one, rounding=rounding) for one in given]


def overlong_penalty(num_tokens: int, *, longest: int, buffer: int, factor: float = 1.0) -> float:
    """What DAPO adds to an answer's reward for its length (2503.14476, eq. 13), between ``-factor`` and 0.

    0 up to ``longest - buffer`` tokens, falling in a straight line to ``-factor`` at ``longest`` and beyond.
    Raises ValueError for a buffer that is not within the longest answer.
    """
    if not 0 < buffer <= longest:
        raise ValueError(f"a buffer of {buffer} tokens is not within the longest answer of {longest}")
    over = num_tokens - (longest - buffer)
    return -factor * min(max(over, 0) / buffer, 1.0)


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
