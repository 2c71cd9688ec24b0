"""Routing inside towers: a token sees only the experts of the tower that judges its row.

Shape suffixes: S tokens of this rank (a slice of the sequence under sequence parallelism), B rows, H hidden,
T = S · B tokens flattened, E experts, K chosen experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.engine.experts import ExpertRouter, spread
from prism_megatron.losses.load_balance import load_balance_loss, sequence_sums


def mask_other_towers(logits_S_B_E: Tensor, tower_ids_B: Tensor, num_towers: int) -> Tensor:
    """Logits with the experts of other towers at minus infinity (a new tensor)."""
    expert_tower_E = torch.arange(logits_S_B_E.shape[-1], device=logits_S_B_E.device) % num_towers
    other_B_E = expert_tower_E != (tower_ids_B % num_towers).unsqueeze(-1)
    return logits_S_B_E.masked_fill(other_B_E, -torch.inf)


def choose_experts(masked_S_B_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates (sum 1 over the chosen, 0 elsewhere) and the chosen experts as a bool map, both ``[S, B, E]``.

    The softmax over the chosen logits equals the tower's full softmax renormalised over them.
    """
    top_S_B_K, index_S_B_K = masked_S_B_E.topk(top_k, dim=-1)
    return spread(top_S_B_K.softmax(dim=-1), index_S_B_K, masked_S_B_E.shape[-1])


class AttachLoss(torch.autograd.Function):
    """Returns ``values`` unchanged and gives ``loss`` a gradient of 1 when they are differentiated.

    The loss of the step must not be scaled afterwards: ours arrive divided by global denominators, and the
    optimizer's loss scale is 1 in fp32 and bf16. (Megatron's own attachment keeps its scale in a class variable, and
    its two supported versions multiply by different token counts.)
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_values, torch.ones_like(loss)


class TowerRouter(ExpertRouter):
    """A router restricted to the row's tower; all of it in float32."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        towers: Towers,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer=is_mtp_layer)
        self.towers = towers
        # The ranks that share a sequence. (Experts at tp > 1 need sequence parallelism, so tp always cuts it.)
        self.sequence_group = pg_collection.tp_cp

    def forward(
        self,
        hidden_S_B_H: Tensor,
        tower_ids_B: Tensor,
        lengths_B: Tensor,
        tokens_S: Tensor,
        balance_weights_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gates ``[T, E]`` (float32) and routing map ``[T, E]`` (bool).

        ``tokens_S`` are the numbers, in their rows, of the tokens that this rank holds.
        ``balance_weights_B`` weighs each row's load-balancing loss (``losses.load_balance``); None attaches nothing.
        """
        logits_S_B_E = functional.linear(hidden_S_B_H.float(), self.weight.float())
        masked_S_B_E = mask_other_towers(logits_S_B_E, tower_ids_B, self.towers.num_towers)
        gates_S_B_E, chosen_S_B_E = choose_experts(masked_S_B_E, self.towers.top_k)
        if balance_weights_B is not None:
            valid_S_B = tokens_S.unsqueeze(-1) < lengths_B
            loss = self._balance_loss(
                masked_S_B_E.softmax(dim=-1), chosen_S_B_E, valid_S_B, lengths_B, balance_weights_B
            )
            gates_S_B_E = AttachLoss.apply(gates_S_B_E, loss)  # type: ignore[no-untyped-call]
        return gates_S_B_E.flatten(0, 1), chosen_S_B_E.flatten(0, 1)

    def _balance_loss(
        self, probs_S_B_E: Tensor, chosen_S_B_E: Tensor, valid_S_B: Tensor, lengths_B: Tensor, weights_B: Tensor
    ) -> Tensor:
        counts_B_E, prob_sums_B_E = sequence_sums(probs_S_B_E, chosen_S_B_E, valid_S_B)
        if self.sequence_group.size() > 1:
            # Every rank ends with the whole sequence's sums and the same loss. Backward is the identity: a rank's
            # gradient is that of its own tokens, and the router's weight gradient is summed over the group.
            dist.all_reduce(counts_B_E, group=self.sequence_group)
            prob_sums_B_E = reduce_from_tensor_model_parallel_region(prob_sums_B_E, group=self.sequence_group)
        return load_balance_loss(
            counts_B_E,
            prob_sums_B_E,
            lengths_B,
            weights_B,
            top_k=self.towers.top_k,
            experts_per_tower=self.towers.experts_per_tower,
        )
