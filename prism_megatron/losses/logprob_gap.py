"""How far the rollout engine's log-probs are from the trainer's, for the same tokens and the same weights.

Shape suffixes: B rows, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prism_megatron.losses.policy.surrogate import MAX_LOG_RATIO


@dataclass(frozen=True, eq=False)
class LogprobGap:
    """Float64 scalars over the masked tokens; ``largest`` is 0 where there are none."""

    tokens: Tensor
    absolute: Tensor
    """sum of |policy - rollout|"""
    largest: Tensor
    """largest |policy - rollout|"""
    kl: Tensor
    """sum of the k3 estimator of KL(rollout ‖ policy): r - 1 - log r with r = policy / rollout; log r within ±20"""


def logprob_gap(policy_logprobs_B_S: Tensor, rollout_logprobs_B_S: Tensor, mask_B_S: Tensor) -> LogprobGap:
    """Figures of one micro-batch, of which all but ``largest`` add. k3: Schulman, "Approximating KL divergence", 2020.

    Every term of k3 is at least 0, and its mean over tokens drawn by the rollout engine is unbiased.
    """
    mask = mask_B_S.bool()
    log_ratio = (policy_logprobs_B_S.detach().double() - rollout_logprobs_B_S.double()).masked_fill(~mask, 0.0)
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return LogprobGap(
        tokens=mask.sum().double(),
        absolute=log_ratio.abs().sum(),
        largest=log_ratio.abs().max(),
        kl=(clamped.expm1() - clamped).sum(),
    )
