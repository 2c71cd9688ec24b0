"""Pipeline chunks of a discriminator: Qwen3-VL trunk, expert towers, scalar head.

Shape suffixes: S_local tokens of this sequence-parallel rank, B rows, H hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from torch import Tensor, nn

from model_providers.qwen3_vl.deepstack import Ints
from model_providers.qwen3_vl.model import Qwen3VLTrunk
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.norms import parameter_device
from prism_megatron.engine.specs import mark_tensor_parallel

DROPOUT_KEY = "dropout_key"
LOAD_BALANCE_WEIGHT = "load_balance_weight"


def keyed_dropout(hidden_B_H: Tensor, keys_B: Tensor, rate: float) -> Tensor:
    """Dropout whose mask depends only on each row's integer key: the same in every layout, and on resume.

    Raises TypeError for keys that are not int64: a float key would have lost its low bits.
    """
    if keys_B.dtype != torch.int64:
        raise TypeError(f"dropout keys must be int64, got {keys_B.dtype}")
    hidden = hidden_B_H.shape[-1]
    draws = [np.random.Generator(np.random.Philox(key)).random(hidden) for key in keys_B.tolist()]
    keep_B_H = torch.from_numpy(np.stack(draws) >= rate).to(hidden_B_H.device)
    return hidden_B_H * keep_B_H / (1.0 - rate)


class ScoreHead(nn.Module):
    """A linear map to one number, without bias, in float32; replicated on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=parameter_device(config))
        )

    def forward(self, hidden_B_H: Tensor, keys_B: Tensor | None) -> Tensor:
        """``[2, B]``: scores without dropout, and scores with it (the same ones when the rate is 0).

        Raises ValueError when dropout is to be applied for a gradient and the batch has no keys.
        """
        hidden_B_H = hidden_B_H.float()
        dropped_B_H = hidden_B_H
        if self.dropout > 0.0 and keys_B is not None:
            dropped_B_H = keyed_dropout(hidden_B_H, keys_B, self.dropout)
        elif self.dropout > 0.0 and torch.is_grad_enabled():
            raise ValueError(f"the head's dropout of {self.dropout} needs extras[{DROPOUT_KEY!r}] in the batch")
        return torch.stack([hidden_B_H, dropped_B_H]) @ self.weight[0].float()


class Discriminator(Qwen3VLTrunk):
    """The trunk with expert towers; the last chunk's output is ``[2, B]`` (see ``ScoreHead``).

    A batch needs ``tower_ids_Q`` and one sequence to a row. Extras: ``dropout_key`` (int64), and
    ``load_balance_weight`` (float32) to attach the load-balancing loss; without the latter nothing is computed for it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: Qwen3VLShape,
        layer_spec: ModuleSpec,
        groups: ProcessGroupCollection,
        *,
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
        if post_process:
            self.score_head = ScoreHead(config, head_dropout)
        mark_tensor_parallel(self)

    def mlp_args(self, batch: Batch, tokens_L: Ints) -> tuple[Tensor, ...]:
        """Tower and length of each row, the local tokens, and the load-balancing weights where the batch has them."""
        if batch.tower_ids_Q is None:
            raise ValueError("a discriminator batch needs tower_ids_Q, the tower that judges each row")
        if batch.packed:
            raise ValueError("a discriminator takes one sequence to a row; collate its batches without pack")
        weights_B = batch.extras.get(LOAD_BALANCE_WEIGHT)
        always = (batch.tower_ids_Q, batch.lengths_Q, torch.from_numpy(tokens_L).to(batch.input_ids_B_S.device))
        return always if weights_B is None else (*always, weights_B)

    def head(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Scores ``[2, B]`` from the hidden state of each row's last real token; equal on all ranks that share rows."""
        last_B = np.array(batch.lengths) - 1
        keys_B = batch.extras.get(DROPOUT_KEY)
        scores_2_B: Tensor = self.score_head(self._last_hidden(hidden, last_B, self.local_tokens(batch)), keys_B)
        if self.cp_group.size() == 1:
            return scores_2_B
        tokens_L = batch.tokens_of(cp_size=self.cp_group.size(), cp_rank=self.cp_group.rank())
        elsewhere_B = torch.from_numpy(~np.isin(last_B, tokens_L)).to(scores_2_B.device)
        # Sum forward, identity backward: the head's weight gets each row's gradient on one context-parallel rank.
        scores_2_B = scores_2_B.masked_fill(elsewhere_B, 0.0)
        summed_2_B: Tensor = reduce_from_tensor_model_parallel_region(scores_2_B, group=self.cp_group)
        return summed_2_B

    def _last_hidden(self, hidden: Tensor, last_B: Ints, tokens_L: Ints) -> Tensor:
        """``[B, H]``, whole on every tensor-parallel rank; zeros for a row whose last token another rank holds."""
        sorter = np.argsort(tokens_L)
        place_B = sorter[np.searchsorted(tokens_L, last_B, sorter=sorter).clip(max=len(tokens_L) - 1)]
        elsewhere_B = torch.from_numpy(tokens_L[place_B] != last_B).to(hidden.device)
        rows_B = torch.arange(len(last_B), device=hidden.device)
        picked_B_H = hidden[torch.from_numpy(place_B).to(hidden.device), rows_B]
        picked_B_H = picked_B_H.masked_fill(elsewhere_B.unsqueeze(-1), 0.0)
        if not self.config.sequence_parallel:
            return picked_B_H
        # Sum forward, identity backward: each rank's own rows get the (equal) gradient of the replicated head.
        last_B_H: Tensor = reduce_from_tensor_model_parallel_region(picked_B_H, group=self.tp_group)
        return last_B_H
