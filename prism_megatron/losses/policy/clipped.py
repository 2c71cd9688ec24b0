"""The policy gradient, and PPO's clipped ratio as GRPO, DAPO and Dr. GRPO have it.

These three have the same objective of a token. They differ by the bounds, by the mean that is taken and by the
advantages: see ``docs/algorithms.md``. Shape suffix: n response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_megatron.losses.policy.surrogate import Surrogate, token_ratios


def policy_gradient(logprobs_n: Tensor, advantages_n: Tensor) -> Surrogate:
    """``pi / sg[pi] * A``: its value is A, and its gradient REINFORCE's, ``A * grad log pi`` (Williams, 1992)."""
    ratio_n = token_ratios(logprobs_n, None)
    nowhere_n = torch.zeros_like(advantages_n, dtype=torch.bool)
    return Surrogate(ratio_n * advantages_n, ratio_n.detach(), nowhere_n, nowhere_n, nowhere_n)


def clipped(
    logprobs_n: Tensor,
    old_logprobs_n: Tensor | None,
    advantages_n: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> Surrogate:
    """``min(r A, clip(r, 1 - low, 1 + high) A)`` with ``r = exp(logprob - old_logprob)`` (1707.06347, eq. 7).

    GRPO (2402.03300, eq. 3) and Dr. GRPO (2503.20783, section 3.2) have one bound, DAPO (2503.14476, eq. 10) a wider
    upper one. For A < 0 the term is bounded from below by ``dual_clip * A`` (1912.09729, eq. 5), unless that is 0.
    """
    return bounded(
        token_ratios(logprobs_n, old_logprobs_n),
        advantages_n,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )


def bounded(
    ratio_n: Tensor, advantages_n: Tensor, *, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> Surrogate:
    """The clipped objective of any ratio, a token's or a sequence's."""
    objective_n = torch.minimum(ratio_n * advantages_n, ratio_n.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_n)
    negative_n, now_n = advantages_n < 0, ratio_n.detach()
    dual_n = torch.zeros_like(negative_n)
    if dual_clip:
        objective_n = torch.where(negative_n, torch.maximum(objective_n, dual_clip * advantages_n), objective_n)
        dual_n = negative_n & (now_n > dual_clip)
    return Surrogate(
        objective_n,
        now_n,
        low_n=negative_n & (now_n < 1.0 - clip_low),
        high_n=(advantages_n > 0) & (now_n > 1.0 + clip_high),
        dual_n=dual_n,
    )
