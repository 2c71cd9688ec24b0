"""The experts of a rank: Megatron's modules, with SwiGLU and the gates in one function (``swiglu.weighted_swiglu``).

Where ``config.bias_activation_fusion`` is set it is compiled, once for any number of tokens. Megatron's own fusion is
compiled for the numbers that come first, and again for others, which experts have in every micro-batch.
Shape suffixes: N tokens of this rank's experts, one expert after another, H hidden.
"""

from __future__ import annotations

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from torch import Tensor, cat

from prism_megatron.engine.layers.swiglu import weighted_swiglu


class LoopedExperts(SequentialMLP):
    """One expert after another, over torch."""

    def forward(self, tokens_N_H: Tensor, tokens_per_expert: Tensor, gates_N: Tensor) -> tuple[Tensor, None]:
        """``[N, H]`` to the same, times the gates; ``None`` stands for the bias."""
        counts = tokens_per_expert.tolist()
        parts = zip(self.local_experts, tokens_N_H.split(counts), gates_N.split(counts), strict=True)
        return cat([_transformed(*part) for part in parts]), None


def _transformed(expert: MLP, tokens_N_H: Tensor, gates_N: Tensor) -> Tensor:
    gate_up, _ = expert.linear_fc1(tokens_N_H)
    hidden = weighted_swiglu(gate_up, gates_N, compiled=expert.config.bias_activation_fusion)
    output: Tensor = expert.linear_fc2(hidden)[0]
    return output


class GroupedExperts(TEGroupedMLP):
    """All experts of a rank in Transformer Engine's grouped products, padded to the blocks of FP8."""

    def forward(self, tokens_N_H: Tensor, tokens_per_expert: Tensor, gates_N: Tensor) -> tuple[Tensor, None]:
        """``[N, H]`` to the same, times the gates; ``None`` stands for the bias."""
        counts = padded = tokens_per_expert.tolist()
        gates_N_1 = gates_N.unsqueeze(-1)
        if self.config.fp8:
            tokens_N_H, padded = self.quantization_padding(tokens_N_H, counts)
            gates_N_1, _ = self.quantization_padding(gates_N_1, counts)
        gate_up, _ = self.linear_fc1(tokens_N_H, padded)
        hidden = weighted_swiglu(gate_up, gates_N_1.squeeze(-1), compiled=self.config.bias_activation_fusion)
        output, _ = self.linear_fc2(hidden, padded)
        return (self.quantization_unpadding(output, counts) if self.config.fp8 else output), None
