"""Pipeline chunks of a discriminator: Qwen3-VL trunk, expert towers, scalar head.

Shape suffixes: S_local tokens of this sequence-parallel rank, L tokens of this rank, B rows, Q sequences, H hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from torch import Tensor, nn

from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.deepstack import Ints
from model_providers.qwen3_vl.model import Qwen3VLTrunk
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.stages.discriminator import LoadBalanceScope
from prism_megatron.engine.batch import Batch, Extra, token_sequences
from prism_megatron.engine.layers.norms import parameter_device
from prism_megatron.engine.layers.specs import mark_tensor_parallel
from prism_megatron.losses.load_balance import member_sums, merge_towers
from prism_megatron.parallel.host_to_device import on_device


def keyed_dropout(hidden_Q_H: Tensor, keys_Q: Ints, rate: float) -> Tensor:
    """Dropout whose mask depends only on each sequence's integer key: the same in every layout, and on resume.

    Raises TypeError for keys that are not int64: a float key would have lost its low bits.
    """
    if keys_Q.dtype != np.int64:
        raise TypeError(f"dropout keys must be int64, got {keys_Q.dtype}")
    hidden = hidden_Q_H.shape[-1]
    draws = [np.random.Generator(np.random.Philox(key)).random(hidden) for key in keys_Q.tolist()]
    keep_Q_H = on_device(np.stack(draws) >= rate, hidden_Q_H.device)
    return hidden_Q_H * keep_Q_H / (1.0 - rate)


class ScoreHead(nn.Module):
    """A linear map to one number, without bias, in float32; replicated on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=parameter_device(config))
        )

    def forward(self, hidden_Q_H: Tensor, keys_Q: Ints | None) -> Tensor:
        """``[2, Q]``: scores without dropout, and scores with it (the same ones when the rate is 0).

        Raises ValueError when dropout is to be applied for a gradient and the batch has no keys.
        """
        hidden_Q_H = hidden_Q_H.float()
        dropped_Q_H = hidden_Q_H
        if self.dropout > 0.0 and keys_Q is not None:
            dropped_Q_H = keyed_dropout(hidden_Q_H, keys_Q, self.dropout)
        elif self.dropout > 0.0 and torch.is_grad_enabled():
            raise ValueError(f"the head's dropout of {self.dropout} needs {Extra.DROPOUT_KEY!r} in the batch")
        return torch.stack([hidden_Q_H, dropped_Q_H]) @ self.weight[0].float()


class Discriminator(Qwen3VLTrunk):
    """The trunk with expert towers; the last chunk's output is ``[2, Q]`` (see ``ScoreHead``).

    A batch, padded or packed, needs ``tower_ids_Q``. Extras by sequence: ``dropout_key`` (int64), and, to attach losses
    of every router, ``load_balance_weight`` (float32) and, for a ``router_z_loss`` coefficient above 0,
    ``sequence_share`` (float32): 1 over the step's sequences of its tower. Without ``towers`` there is no router.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: Qwen3VLShape,
        layer_spec: ModuleSpec,
        groups: ProcessGroupCollection,
        *,
        towers: Towers | None,
        load_balance_scope: LoadBalanceScope,
        router_z_loss: float,
        head_dropout: float,
        recompute_vision: bool,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config,
            shape,
            layer_spec,
            groups,
            recompute_vision=recompute_vision,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.towers = towers
        self.load_balance_scope = load_balance_scope
        self.router_z_loss = router_z_loss
        if post_process:
            self.score_head = ScoreHead(config, head_dropout)
        mark_tensor_parallel(self)

    def mlp_args(self, batch: Batch, tokens_L: Ints) -> tuple[Tensor, ...]:
        """What ``TowerRouter`` takes beside the hidden states of the local tokens; nothing without towers."""
        if self.towers is None:
            return ()
        if batch.tower_ids_Q is None:
            raise ValueError("a discriminator batch needs tower_ids_Q, the tower that judges each sequence")
        device = batch.input_ids_B_S.device
        slot_L_B, is_real_L_B = (on_device(of, device) for of in token_sequences(batch, tokens_L))
        tower_ids_L_B, lengths_Q = batch.tower_ids_Q[slot_L_B], batch.lengths_Q
        sequence_L_B = slot_L_B.where(is_real_L_B, len(lengths_Q))
        balance_Q, z_Q = self._loss_weights(batch)
        if balance_Q is None and z_Q is None:
            return tower_ids_L_B, sequence_L_B, lengths_Q
        nothing = lengths_Q.new_zeros(len(lengths_Q), dtype=torch.float32)
        balance_Q, z_Q = (nothing if weights_Q is None else weights_Q for weights_Q in (balance_Q, z_Q))
        slot_P, sequence_P = (on_device(of, device) for of in batch.stretches())
        lengths_Q = member_sums(lengths_Q, slot_P, sequence_P, num=len(lengths_Q))
        # A prompt's tokens count in every sequence that goes on from it.
        z_weights_Q = member_sums(z_Q / lengths_Q.clamp(min=1), sequence_P, slot_P, num=len(lengths_Q))
        z_weights_L_B = z_weights_Q[slot_L_B] * is_real_L_B
        if self.load_balance_scope == "microbatch":
            towers_Q, num_towers = batch.tower_ids_Q % self.towers.num_towers, self.towers.num_towers
            lengths_K, weights_K = merge_towers(towers_Q, lengths_Q, balance_Q, num_towers=num_towers)
            members_2_P = torch.stack([slot_P, towers_Q[sequence_P]])
        else:
            lengths_K, weights_K, members_2_P = lengths_Q, balance_Q, torch.stack([slot_P, sequence_P])
        return tower_ids_L_B, sequence_L_B, lengths_Q, members_2_P, lengths_K, weights_K, z_weights_L_B

    def _loss_weights(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """What each sequence's load-balancing and z-losses are multiplied by; None where there is nothing to attach."""
        balance_Q, share_Q = batch.extras.get(Extra.LOAD_BALANCE_WEIGHT), batch.extras.get(Extra.SEQUENCE_SHARE)
        if not torch.is_grad_enabled():
            return None, None
        if not self.router_z_loss:
            return balance_Q, None
        if share_Q is None:
            raise ValueError(f"a router z-loss of {self.router_z_loss} needs {Extra.SEQUENCE_SHARE!r} in the batch")
        return balance_Q, self.router_z_loss * share_Q

    def head(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Scores ``[2, Q]`` from each sequence's last real token; equal on all ranks that share the micro-batch."""
        row_Q, start_Q = np.array(batch.places()).T
        last_Q = start_Q + np.array(batch.lengths) - 1
        keys_Q = batch.host_extras.get(Extra.DROPOUT_KEY)
        last_Q_H = self._pick(hidden, last_Q, row_Q, self.local_tokens(batch))
        scores_2_Q: Tensor = self.score_head(last_Q_H, keys_Q)
        if self.cp_group.size() == 1:
            return scores_2_Q
        tokens_L = batch.tokens_of(cp_size=self.cp_group.size(), cp_rank=self.cp_group.rank())
        elsewhere_Q = on_device(~np.isin(last_Q, tokens_L), scores_2_Q.device)
        # Sum forward, identity backward: the head's weight gets each score's gradient on one context-parallel rank.
        scores_2_Q = scores_2_Q.masked_fill(elsewhere_Q, 0.0)
        summed_2_Q: Tensor = reduce_from_tensor_model_parallel_region(scores_2_Q, group=self.cp_group)
        return summed_2_Q

    def _pick(self, hidden: Tensor, token_Q: Ints, row_Q: Ints, tokens_L: Ints) -> Tensor:
        """Hidden states ``[Q, H]`` of tokens, whole on every tensor-parallel rank; zeros for what another rank holds.

        ``tokens_L`` are the tokens of each row that ``hidden [L, B, H]`` has.
        """
        sorter = np.argsort(tokens_L)
        place_Q = sorter[np.searchsorted(tokens_L, token_Q, sorter=sorter).clip(max=len(tokens_L) - 1)]
        elsewhere_Q = on_device(tokens_L[place_Q] != token_Q, hidden.device)
        picked_Q_H = hidden[on_device(place_Q, hidden.device), on_device(row_Q, hidden.device)]
        picked_Q_H = picked_Q_H.masked_fill(elsewhere_Q.unsqueeze(-1), 0.0)
        if not self.config.sequence_parallel:
            return picked_Q_H
        # Sum forward, identity backward: each rank's own rows get the (equal) gradient of the replicated head.
        last_Q_H: Tensor = reduce_from_tensor_model_parallel_region(picked_Q_H, group=self.tp_group)
        return last_Q_H
