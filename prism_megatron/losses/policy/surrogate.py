"""What the algorithms have in common: a probability ratio, an objective of every token, and where a bound holds.

Shape suffix: n response tokens, in any order, of any rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios beyond ± this are taken for it before they are exponentiated, as other trainers do."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """An objective to be maximised, token by token. All but ``objective_n`` is detached."""

    objective_n: Tensor
    ratio_n: Tensor
    """probability under the policy now over that before the first update: of the token, or of its row"""
    low_n: Tensor
    """whether the lower bound holds the token: its gradient is stopped, or for cispo its weight"""
    high_n: Tensor
    """the same of the upper bound"""
    dual_n: Tensor
    """the same of the dual clip"""


def token_ratios(logprobs_n: Tensor, old_logprobs_n: Tensor | None) -> Tensor:
    """``exp(logprob - old_logprob)``; without old log-probs they are the detached new ones, and every ratio is 1."""
    old_n = logprobs_n.detach() if old_logprobs_n is None else old_logprobs_n.detach()
    return (logprobs_n - old_n).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
