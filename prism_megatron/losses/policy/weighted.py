"""REINFORCE with a detached weight: CISPO and DPPO. Their value follows log pi and says little; the gradient counts.

Shape suffix: n response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_megatron.losses.policy.surrogate import Surrogate, token_ratios


def cispo(
    logprobs_n: Tensor, old_logprobs_n: Tensor | None, advantages_n: Tensor, *, clip_low: float, clip_high: float
) -> Surrogate:
    """``sg[clip(r, 1 - low, 1 + high)] * A * log pi`` (2506.13585, eq. 4 and 5); every token keeps a gradient.

    With ``clip_low`` 1 or more there is no lower bound, as in the paper's runs.
    """
    ratio_n = token_ratios(logprobs_n.detach(), old_logprobs_n)
    weight_n = ratio_n.clamp(1.0 - clip_low, 1.0 + clip_high)
    return Surrogate(
        weight_n * advantages_n * logprobs_n,
        ratio_n,
        low_n=ratio_n < 1.0 - clip_low,
        high_n=ratio_n > 1.0 + clip_high,
        dual_n=torch.zeros_like(advantages_n, dtype=torch.bool),
    )


def dppo(
    logprobs_n: Tensor, old_logprobs_n: Tensor | None, advantages_n: Tensor, *, bound: float, cap: float
) -> Surrogate:
    """``M * sg[min(r, cap)] * A * log pi`` (DPPO-Binary-TV, 2602.04879).

    M is 0 where A > 0 and pi - pi_old > ``bound``, or A <= 0 and pi - pi_old < -``bound``: the total variation between
    the two policies, as far as the sampled token shows it, is large already and would grow.
    """
    now_n = logprobs_n.detach()
    old_n = now_n if old_logprobs_n is None else old_logprobs_n.detach()
    ratio_n = token_ratios(now_n, old_n)
    moved_n = now_n.exp() - old_n.exp()
    high_n, low_n = (advantages_n > 0) & (moved_n > bound), (advantages_n <= 0) & (moved_n < -bound)
    weight_n = ratio_n.clamp(max=cap).masked_fill(high_n | low_n, 0.0)
    dual_n = torch.zeros_like(advantages_n, dtype=torch.bool)
    return Surrogate(weight_n * advantages_n * logprobs_n, ratio_n, low_n, high_n, dual_n)
