"""Objectives of one ratio for a whole answer: GSPO, GSPO-token and GMPO.

Shape suffix: n response tokens. An answer's objective stands at each of its tokens; the mean over them is the answer's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_megatron.losses.policy.clipped import bounded
from prism_megatron.losses.policy.rows import Rows
from prism_megatron.losses.policy.surrogate import MAX_LOG_RATIO, Surrogate


def gspo(
    logprobs_n: Tensor,
    old_logprobs_n: Tensor | None,
    advantages_n: Tensor,
    rows: Rows,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """``min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)`` with ``s_i = exp(mean_t log r_it)`` (2507.18071, eq. 5 and 7).

    The gradient goes through s_i, so that every token of an answer gets the answer's mean advantage.
    """
    ratio_n = _sequence_ratios(logprobs_n, old_logprobs_n, rows)
    return bounded(ratio_n, advantages_n, clip_low=clip_low, clip_high=clip_high)


def gspo_token(
    logprobs_n: Tensor,
    old_logprobs_n: Tensor | None,
    advantages_n: Tensor,
    rows: Rows,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """As ``gspo`` with ``s_it = sg[s_i] * pi_it / sg[pi_it]`` (2507.18071, eq. 13 and 14).

    A token's gradient has its own advantage; where an answer's advantages are all the same it is ``gspo``'s.
    """
    ratio_n = _sequence_ratios(logprobs_n.detach(), old_logprobs_n, rows) * (logprobs_n - logprobs_n.detach()).exp()
    return bounded(ratio_n, advantages_n, clip_low=clip_low, clip_high=clip_high)


def gmpo(
    logprobs_n: Tensor,
    old_logprobs_n: Tensor | None,
    advantages_n: Tensor,
    rows: Rows,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """``exp(mean_t c_it) A_i`` with c the log-ratio, clipped to [-low, high] on the side that A pushes it to.

    GMPO (2507.20673, section 3): c is min(log r, high) for A > 0 and max(log r, -low) for A < 0.
    """
    log_n = _log_ratios(logprobs_n, old_logprobs_n)
    sign_n = advantages_n.sign()
    held_n = sign_n * torch.minimum(sign_n * log_n, sign_n * log_n.clamp(-clip_low, clip_high))
    ratio_n = rows.means(held_n).exp()
    now_n = log_n.detach()
    return Surrogate(
        ratio_n * advantages_n,
        ratio_n.detach(),
        low_n=(advantages_n < 0) & (now_n < -clip_low),
        high_n=(advantages_n > 0) & (now_n > clip_high),
        dual_n=torch.zeros_like(advantages_n, dtype=torch.bool),
    )


def _log_ratios(logprobs_n: Tensor, old_logprobs_n: Tensor | None) -> Tensor:
    old_n = logprobs_n.detach() if old_logprobs_n is None else old_logprobs_n.detach()
    return (logprobs_n - old_n).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _sequence_ratios(logprobs_n: Tensor, old_logprobs_n: Tensor | None, rows: Rows) -> Tensor:
    return rows.means(_log_ratios(logprobs_n, old_logprobs_n)).exp()
