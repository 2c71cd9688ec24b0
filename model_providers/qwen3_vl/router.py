"""The router of a Qwen3-VL with experts, and what it loses where load is unbalanced or logits are large.

Shape suffixes: S tokens of this rank, B rows, H hidden, T = S · B tokens flattened, E experts, K chosen experts,
Q sequences, L layers of the whole model, X values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from torch.nn import functional

from prism_megatron.config.engine.experts import ExpertSizes, RouterLosses
from prism_megatron.engine.layers.experts import AttachLoss, ExpertRouter, balance_of_sequences, fused_choice, spread
from prism_megatron.losses.load_balance import router_z_loss

LOSS_SUMS = ("load-balancing losses, weighed", "their weights", "z-losses, weighed", "their weights")
"""What a router counts beside its choices; weights add up to 1 over a step that is not recomputed."""


def softmax_gates(logits_T_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates (in the dtype of the logits, 0 for experts not chosen) and the chosen experts (bool), both ``[T, E]``.

    Softmax in float32 over all experts, the K largest divided by their sum, then the cast: the operations, their
    order and their dtypes are those of transformers 5.23 (``Qwen3VLMoeTextTopKRouter``), so that equal logits choose
    equal experts, ties included.
    """
    probs_T_E = functional.softmax(logits_T_E, dim=-1, dtype=torch.float32)
    top_T_K, experts_T_K = probs_T_E.topk(top_k, dim=-1)
    gates_T_K = (top_T_K / top_T_K.sum(dim=-1, keepdim=True)).to(logits_T_E.dtype)
    return spread(gates_T_K, experts_T_K, logits_T_E.shape[-1])


class SoftmaxRouter(ExpertRouter):
    """Every token goes to its ``moe_router_topk`` best experts.

    The gate's product is in the dtype of the model, as in transformers; losses are in float32. They are means over the
    tokens of the step: of a sequence's load-balancing loss, weighed by its length, and of a token's z-loss. That of a
    sequence is Switch's (losses/load_balance.py) over its own tokens: neither micro-batches nor ranks change it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        losses: RouterLosses,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer=is_mtp_layer)
        self.losses = losses
        # The ranks that share a sequence. (Experts at tp > 1 need sequence parallelism, so tp always cuts it.)
        self.sequence_group = pg_collection.tp_cp
        self.counted: Tensor
        counted = torch.zeros(config.num_moe_experts + len(LOSS_SUMS), dtype=torch.float64, device=self.weight.device)
        self.register_buffer("counted", counted, persistent=False)

    def forward(
        self,
        hidden_S_B_H: Tensor,
        sequence_S_B: Tensor,
        lengths_Q: Tensor,
        shares_Q: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gates ``[T, E]`` and routing map ``[T, E]`` (bool).

        ``sequence_S_B`` is the number of each token's sequence, and Q for padding. ``shares_Q`` are the
        sequences' shares of the step's tokens; without them no loss is attached.
        """
        top_k: int = self.config.moe_router_topk
        logits_T_E = functional.linear(hidden_S_B_H.flatten(0, 1), self.weight)
        choose = fused_choice if self.config.moe_router_fusion else softmax_gates
        gates_T_E, chosen_T_E = choose(logits_T_E, top_k)
        sequence_T = sequence_S_B.flatten()
        counts_T = sequence_T < len(lengths_Q)
        if shares_Q is not None:
            counts_T &= functional.pad(shares_Q, (0, 1))[sequence_T] > 0  # sequences that fill up are learned by nobody
        self.counted[: chosen_T_E.shape[-1]] += (chosen_T_E & counts_T.unsqueeze(-1)).sum(dim=0)
        if shares_Q is None or not self.losses:
            return gates_T_E, chosen_T_E
        wide_T_E = logits_T_E.float()
        balance = balance_of_sequences(
            wide_T_E.softmax(dim=-1), chosen_T_E, sequence_T, lengths_Q=lengths_Q, weights_Q=shares_Q, top_k=top_k,
            experts_per_tower=chosen_T_E.shape[-1], group=self.sequence_group,
        )  # fmt: skip
        of_token_T = functional.pad(shares_Q / lengths_Q, (0, 1))[sequence_T]
        z = router_z_loss(wide_T_E, of_token_T)
        sums = torch.stack([balance.detach(), shares_Q.sum(), z.detach(), of_token_T.sum()])
        self.counted[chosen_T_E.shape[-1] :] += sums
        loss = self.losses.balance * balance + self.losses.z * z
        return AttachLoss.apply(gates_T_E, loss), chosen_T_E  # type: ignore[no-untyped-call]

    def take_counted(self) -> Tensor:
        """``[E + 4]``: how often real tokens chose each expert since the last call, and ``LOSS_SUMS``."""
        taken = self.counted.clone()
        self.counted.zero_()
        return taken


def expert_figures(
    modules: Sequence[MegatronModule], experts: ExpertSizes, num_layers: int, sum_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """How evenly the experts of a pass were used, and their routers' losses, as means over layers.

    ``experts/peak_load`` is the busiest expert's share of a layer's tokens over the mean share (1 is even),
    ``experts/entropy`` the shares' entropy (1 is even, 0 a single expert), ``experts/idle_share`` the share of experts
    that no token chose. A layer that is recomputed counts twice, in shares and weights alike, which cancels out.
    """
    counted_L_X = torch.zeros(num_layers, experts.count + len(LOSS_SUMS), dtype=torch.float64)
    for router in (one for chunk in modules for one in chunk.modules() if isinstance(one, SoftmaxRouter)):
        assert router.layer_number is not None, "Megatron numbers every layer, from 1"
        counted_L_X[router.layer_number - 1] = router.take_counted().cpu()
    device = next(modules[0].parameters()).device
    counted_L_X = sum_over_ranks(counted_L_X.to(device))
    loads_L_E, sums_L_4 = counted_L_X.split([experts.count, len(LOSS_SUMS)], dim=-1)
    figures: dict[str, float] = {}
    if bool((loads_L_E.sum(dim=-1) > 0).all()):
        shares_L_E = loads_L_E / loads_L_E.sum(dim=-1, keepdim=True)
        entropy_L = torch.special.entr(shares_L_E).sum(dim=-1) / math.log(experts.count)
        figures |= {
            "experts/peak_load": float(shares_L_E.amax(dim=-1).mean()) * experts.count,
            "experts/entropy": float(entropy_L.mean()),
            "experts/idle_share": float((loads_L_E == 0).double().mean()),
        }
    balance_L, balanced_L, z_L, weighed_L = sums_L_4.unbind(-1)
    if bool((balanced_L > 0).all()):
        figures |= {
            "experts/balance_loss": float((balance_L / balanced_L).mean()),
            "experts/z_loss": float((z_L / weighed_L).mean()),
        }
    return figures
