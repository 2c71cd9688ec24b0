"""The policy gradient with PPO's clipped ratio (Schulman et al., 1707.06347, eq. 7), token-mean over a global count.

Shape suffixes: B rows, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.losses.reduction import global_mean, masked_sum

MAX_LOG_RATIO = 20.0
"""Log-ratios beyond ± this are taken for it before they are exponentiated, as other trainers do."""


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """``loss`` is this micro-batch's share of the step's loss; the rest are detached sums over its masked tokens."""

    loss: Tensor
    ratio_sum: Tensor
    clipped_tokens: Tensor


def policy_gradient_loss(
    logprobs_B_S: Tensor,
    advantages_B_S: Tensor,
    mask_B_S: Tensor,
    *,
    token_count: float,
    old_logprobs_B_S: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> PolicyLoss:
    """``-sum(min(r A, clip(r, 1 - low, 1 + high) A)) / token_count`` with ``r = exp(logprob - old_logprob)``.

    Advantages are per token, so a whole-response advantage and one per segment take the same path. For A < 0 the
    term is bounded by ``dual_clip * A`` (Ye et al., 1912.09729, eq. 5). Without ``old_logprobs_B_S`` the step is
    strictly on-policy: the old log-probs are the detached new ones, r is 1, no clip binds and the gradient is
    REINFORCE's. ``token_count`` counts masked tokens of the whole step.
    """
    mask = mask_B_S.bool()
    logprobs = logprobs_B_S.masked_fill(~mask, 0.0)
    old = logprobs.detach() if old_logprobs_B_S is None else old_logprobs_B_S.detach().masked_fill(~mask, 0.0)
    ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages_B_S
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_B_S
    objective = torch.minimum(unclipped, clipped)
    bounded = torch.maximum(objective, dual_clip * advantages_B_S)
    objective = torch.where(advantages_B_S < 0, bounded, objective)
    binds = (objective != unclipped).to(logprobs.dtype)
    return PolicyLoss(
        loss=-global_mean(objective, mask, denominator=token_count),
        ratio_sum=masked_sum(ratio.detach(), mask),
        clipped_tokens=masked_sum(binds.detach(), mask),
    )
