"""Estimators of KL(policy ‖ reference) from tokens of the policy (Schulman, "Approximating KL divergence", 2020).

Shape suffix: n response tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prism_megatron.losses.policy.surrogate import MAX_LOG_RATIO


def kl_estimate(logprobs_n: Tensor, reference_logprobs_n: Tensor, *, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """A token's term, with ``d = log pi - log ref``: k1 = d, k2 = d² / 2, k3 = exp(-d) + d - 1.

    The means of k1 and k3 are the divergence. As terms of a loss, of which the gradient counts, on-policy k2 has that
    of the divergence, k3 (GRPO's, 2402.03300, eq. 4) that of the reverse one, and k1 none but noise.
    """
    difference_n = (logprobs_n - reference_logprobs_n.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return difference_n
    if estimator == "k2":
        return difference_n.square() / 2
    return (-difference_n).expm1() + difference_n
