"""Routing inside towers: a token sees only the experts of the tower that judges its sequence.

Shape suffixes: S tokens of this rank (a slice of the sequence under sequence parallelism), B rows, H hidden,
T = S · B tokens flattened, E experts, K segments in
``load_K_E``, else chosen experts per token, Q sequences.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.stages.discriminator import SEGMENTS
from prism_megatron.engine.layers.experts import AttachLoss, ExpertRouter, balance_of_sequences, fused_choice, spread
from prism_megatron.losses.load_balance import router_z_loss


def mask_other_towers(logits_T_E: Tensor, tower_ids_T: Tensor, num_towers: int) -> Tensor:
    """Logits with the experts of other towers at minus infinity (a new tensor)."""
    expert_tower_E = torch.arange(logits_T_E.shape[-1], device=logits_T_E.device) % num_towers
    other_T_E = expert_tower_E != (tower_ids_T % num_towers).unsqueeze(-1)
    return logits_T_E.masked_fill(other_T_E, -torch.inf)


def choose_experts(masked_T_E: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates (sum 1 over the chosen, 0 elsewhere) and the chosen experts as a bool map, both ``[T, E]``.

    The softmax over the chosen logits equals the tower's full softmax renormalised over them.
    """
    top_T_K, index_T_K = masked_T_E.topk(top_k, dim=-1)
    return spread(top_T_K.softmax(dim=-1), index_T_K, masked_T_E.shape[-1])


class TowerRouter(ExpertRouter):
    """A router restricted to the token's tower; all of it in float32."""

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
        load_K_E = torch.zeros(len(SEGMENTS), config.num_moe_experts, dtype=torch.float64, device=self.weight.device)
        self.load_K_E: Tensor
        self.register_buffer("load_K_E", load_K_E, persistent=False)

    def forward(  # noqa: PLR0917  # flat tensors, as a layer hands them on
        self,
        hidden_S_B_H: Tensor,
        tower_ids_S_B: Tensor,
        sequence_S_B: Tensor,
        lengths_Q: Tensor,
        members_2_P: Tensor | None = None,
        lengths_K: Tensor | None = None,
        balance_weights_K: Tensor | None = None,
        z_weights_S_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gates ``[T, E]`` (float32) and routing map ``[T, E]`` (bool).

        ``sequence_S_B`` is the number of each token's slot, and Q for padding. ``members_2_P`` says which slots are
        balanced together, as one of K (``balance_of_sequences``); lengths and weights are theirs, and those of each
        token's z-loss (``losses.load_balance``). None attaches nothing.
        """
        tower_ids_T, sequence_T = tower_ids_S_B.flatten(), sequence_S_B.flatten()
        logits_T_E = functional.linear(hidden_S_B_H.flatten(0, 1).float(), self.weight.float())
        masked_T_E = mask_other_towers(logits_T_E, tower_ids_T, self.towers.num_towers)
        choose = fused_choice if self.config.moe_router_fusion else choose_experts
        gates_T_E, chosen_T_E = choose(masked_T_E, self.towers.top_k)
        chosen_and_real_T_E = chosen_T_E & (sequence_T < len(lengths_Q)).unsqueeze(-1)
        self.load_K_E.index_add_(0, tower_ids_T, chosen_and_real_T_E.to(self.load_K_E.dtype))
        if lengths_K is not None and balance_weights_K is not None and z_weights_S_B is not None:
            balance = balance_of_sequences(
                masked_T_E.softmax(dim=-1), chosen_T_E, sequence_T, lengths_Q=lengths_K, weights_Q=balance_weights_K,
                top_k=self.towers.top_k, experts_per_tower=self.towers.experts_per_tower, group=self.sequence_group,
                num_slots=len(lengths_Q), members_2_P=members_2_P,
            )  # fmt: skip
            loss = balance + router_z_loss(masked_T_E, z_weights_S_B.flatten())
            gates_T_E = AttachLoss.apply(gates_T_E, loss)  # type: ignore[no-untyped-call]
        return gates_T_E, chosen_T_E

    def take_load(self) -> Tensor:
        """``[K, E]``: how often real tokens of each segment chose each expert since the last call."""
        taken = self.load_K_E.clone()
        self.load_K_E.zero_()
        return taken
