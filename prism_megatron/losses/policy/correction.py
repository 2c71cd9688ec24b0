"""Importance weights between the trainer before its update and the engine that drew the rollouts.

Shape suffix: T tokens of one whole answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prism_megatron.losses.policy.surrogate import MAX_LOG_RATIO

Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, eq=False)
class CorrectedRow:
    """Weights of an answer's tokens in float64; 0 for a token that is left out, and out of every mean."""

    weights_T: Tensor
    truncated: int
    """tokens whose weight was held at the bound"""
    vetoed: bool


def correction_weights(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    *,
    level: Level,
    masks: bool,
    low: float,
    high: float,
    veto: float | None = None,
) -> CorrectedRow:
    """``min(w, high)``, or with ``masks`` w where ``low <= w <= high`` and else 0, for every token of one answer.

    w is the token's ratio ``exp(old - rollout)``; for ``sequence`` the product of all the answer's ratios, and for
    ``geometric`` their geometric mean. Truncation: 1802.01561, section 4.1, for policies' rollouts Yao et al., "Your
    efficient RL framework secretly brings you off-policy training", 2025. Masks: the same with rejection (IcePop; MIS).
    ``veto`` leaves an answer out in which any token's ratio is below it. Log-ratios are within ±20, sums of them too.
    """
    log_T = (old_logprobs_T.double() - rollout_logprobs_T.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if level == "sequence":
        of_weight_T = log_T.sum().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expand_as(log_T)
    elif level == "geometric":
        of_weight_T = log_T.mean().expand_as(log_T) if len(log_T) else log_T
    else:
        of_weight_T = log_T
    weights_T = of_weight_T.exp()
    truncated = 0
    if masks:
        weights_T = torch.where((weights_T >= low) & (weights_T <= high), weights_T, 0.0)
    else:
        truncated = int((weights_T > high).sum())
        weights_T = weights_T.clamp(max=high)
    vetoed = veto is not None and bool((log_T.exp() < veto).any())
    return CorrectedRow(torch.zeros_like(weights_T) if vetoed else weights_T, 0 if vetoed else truncated, vetoed)


def effective_share(weights: Tensor) -> float | None:
    """Effective sample size of the weights above 0 as a share of their number, ``(sum w)² / (n sum w²)`` (Kish, 1965).

    None where there are none.
    """
    kept = weights[weights > 0].double()
    return None if len(kept) == 0 else float(kept.sum().square() / (len(kept) * kept.square().sum()))
