"""SAPO: a soft gate in place of a clip. Shape suffix: n response tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_megatron.losses.policy.surrogate import Surrogate, token_ratios


def sapo(
    logprobs_n: Tensor, old_logprobs_n: Tensor | None, advantages_n: Tensor, *, positive: float, negative: float
) -> Surrogate:
    """``4 / tau * sigmoid(tau (r - 1)) * A``, tau by the sign of A (2511.20347, eq. 5 and 6).

    At r = 1 the gradient is the policy gradient's; it fades as r moves to either side, faster for A <= 0.
    """
    ratio_n = token_ratios(logprobs_n, old_logprobs_n)
    tau_n = torch.where(advantages_n > 0, ratio_n.new_tensor(positive), ratio_n.new_tensor(negative))
    gate_n = 4.0 / tau_n * torch.sigmoid(tau_n * (ratio_n - 1.0))
    nowhere_n = torch.zeros_like(advantages_n, dtype=torch.bool)
    return Surrogate(gate_n * advantages_n, ratio_n.detach(), nowhere_n, nowhere_n, nowhere_n)
