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

    A batch needs ``tower_ids_B``. Row extras: ``dropout_key`` (int64), and ``load_balance_weight`` (float32) to attach
    the load-balancing loss; without the latter nothing is computed for it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: Qwen3VLShape,
        layer_spec: ModuleSpec,
        groups: ProcessGroupCollection,
        *,
        head_dropout: float,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config,
            shape,
            layer_spec,
            groups,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.score_head = ScoreHead(config, head_dropout)
        mark_tensor_parallel(self)

    def mlp_args(self, batch: Batch) -> tuple[Tensor, ...]:
        """Tower and length of each row, then the load-balancing weights where the batch has them."""
        if batch.tower_ids_B is None:
            raise ValueError("a discriminator batch needs tower_ids_B, the tower that judges each row")
        weights_B = batch.extras.get(LOAD_BALANCE_WEIGHT)
        always = (batch.tower_ids_B, batch.lengths_B)
        return always if weights_B is None else (*always, weights_B)

    def head(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Scores ``[2, B]`` from the hidden state of each row's last real token; equal on all tensor-parallel ranks."""
        scores_2_B: Tensor = self.score_head(self._last_hidden(hidden, batch.lengths_B), batch.extras.get(DROPOUT_KEY))
        return scores_2_B

    def _last_hidden(self, hidden: Tensor, lengths_B: Tensor) -> Tensor:
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        if not self.config.sequence_parallel:
            return hidden[lengths_B - 1, rows_B]
        num_local = hidden.shape[0]
        position_B = lengths_B - 1 - self.tp_group.rank() * num_local
        elsewhere_B = (position_B < 0) | (position_B >= num_local)
        picked_B_H = hidden[position_B.clamp(0, num_local - 1), rows_B].masked_fill(elsewhere_B.unsqueeze(-1), 0.0)
        # Sum forward, identity backward: each rank's own rows get the (equal) gradient of the replicated head.
        last_B_H: Tensor = reduce_from_tensor_model_parallel_region(picked_B_H, group=self.tp_group)
        return last_B_H
