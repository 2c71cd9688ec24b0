"""Importance weights of tokens that another policy drew than the one that trains on them.

Shape suffixes: B rows, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prism_megatron.losses.policy.surrogate import MAX_LOG_RATIO

TRUNCATE_AT = 2.0
"""Largest weight that a truncated correction would give a token, as other trainers have it by default."""


@dataclass(frozen=True, eq=False)
class ImportanceWeights:
    """Float64 scalars over the masked tokens' weights; ``largest`` is 0 where there are none."""

    tokens: Tensor
    total: Tensor
    """sum of the weights; their mean over many tokens is 1 where the rollout's log-probs are those it drew with"""
    squares: Tensor
    """sum of the squared weights, for the effective sample size (Kish, "Survey Sampling", 1965)"""
    truncated: Tensor
    """how many weights are above the bound"""
    largest: Tensor
    clamped: Tensor
    """how many tokens' log-ratios lay outside ±``MAX_LOG_RATIO``, and counted as that"""


def importance_weights(
    policy_logprobs_B_S: Tensor, rollout_logprobs_B_S: Tensor, mask_B_S: Tensor, *, truncate_at: float = TRUNCATE_AT
) -> ImportanceWeights:
    """Figures of one micro-batch, of which all but ``largest`` add; weight = exp(policy - rollout log-prob) a token.

    ``truncate_at`` is the bound of truncated importance sampling (Espeholt et al., 1802.01561, section 4.1): a loss
    would weigh a token by min(``truncate_at``, weight). The weights here are those before truncation; log-ratios are
    clamped as the loss clamps them, for one token's exponential must not be the whole step's.
    """
    mask = mask_B_S.bool()
    log_weights = (policy_logprobs_B_S.detach().double() - rollout_logprobs_B_S.double()).masked_fill(~mask, 0.0)
    weights = log_weights.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().masked_fill(~mask, 0.0)
    return ImportanceWeights(
        tokens=mask.sum().double(),
        total=weights.sum(),
        squares=weights.square().sum(),
        truncated=(weights > truncate_at).sum().double(),
        largest=weights.max(),
        clamped=(log_weights.abs() > MAX_LOG_RATIO).sum().double(),
    )
