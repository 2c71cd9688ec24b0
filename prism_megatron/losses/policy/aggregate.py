"""From an objective of every token to one of the step. Denominators are those of the whole update, and passed in.

Shape suffix: n response tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prism_megatron.losses.policy.rows import Rows
from prism_megatron.losses.reduction import global_mean

Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum", "budget"]


def denominator_of(kind: Aggregation, *, tokens: int, rows: int, budget: int = 0) -> float:
    """What an update's sum is divided by; ``tokens`` are kept ones of all ranks, ``rows`` the answers that have one.

    token-mean: tokens (DAPO, 2503.14476, eq. 8). sequence-mean: answers, each the mean of its tokens (GRPO, 2402.03300,
    eq. 3). sequence-sum: answers, each the sum of its tokens. budget: answers times a constant (Dr. GRPO, 2503.20783).
    """
    if kind == "token-mean":
        return float(tokens)
    return float(rows * budget if kind == "budget" else rows)


def aggregate(values_n: Tensor, rows: Rows, *, kind: Aggregation, denominator: float) -> Tensor:
    """This micro-batch's and this rank's share of the update's mean (scalar): shares add up to it."""
    if kind == "sequence-mean":
        values_n = values_n / rows.tokens()
    return global_mean(values_n, rows.kept_n, denominator=denominator)
