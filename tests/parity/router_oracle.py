"""What routers lose and whom they choose, from the logits that an oracle's gates gave, sequence by sequence.

Load balancing is transformers' own function on the logits of a tower's experts. Shape suffixes: B rows, S tokens, E
experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.stages.discriminator import SEGMENTS
from prism_megatron.engine.batch import Batch


@contextmanager
def gate_logits(model: Any, batch: Batch) -> Iterator[list[Tensor]]:
    """Collects ``[B, S, E]`` of every layer, in their order, while the model runs ``batch`` (padded)."""
    found: list[Tensor] = []

    def keep(_gate: Any, _inputs: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        found.append(logits.view(*batch.input_ids_B_S.shape, -1))

    gates = [layer.mlp.gate for layer in model.model.language_model.layers if hasattr(layer.mlp, "gate")]
    handles = [gate.register_forward_hook(keep) for gate in gates]
    yield found
    for handle in handles:
        handle.remove()


def own_logits(logits_B_S_E: Tensor, batch: Batch, towers: Towers) -> list[Tensor]:
    """Per row the logits of its real tokens for the experts of its tower."""
    assert batch.tower_ids_Q is not None
    own = []
    for row, (tower, length) in enumerate(zip(batch.tower_ids_Q.tolist(), batch.lengths, strict=True)):
        own.append(logits_B_S_E[row, :length, tower % towers.num_towers :: towers.num_towers])
    return own


def balance_loss(own: Sequence[Tensor], weights: Sequence[float], towers: Towers) -> Tensor:
    """Of one layer: the weighted sum over sequences; 1 for each that is balanced (transformers': top_k)."""
    losses = [load_balancing_loss_func((logits,), logits.shape[-1], towers.top_k) for logits in own]
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / towers.top_k


def merged(
    own: Sequence[Tensor], weights: Sequence[float], pools: Sequence[int], microbatches: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[float]]:
    """The tokens of each micro-batch's sequences of a pool as one, weighing as much as they do together."""
    sets = [[row for row in rows if pools[row] == pool] for rows in microbatches for pool in sorted(set(pools))]
    tokens = [torch.cat([own[row] for row in rows]) for rows in sets if rows]
    return tokens, [sum(weights[row] for row in rows) for rows in sets if rows]


def z_loss(own: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of one layer: the weighted sum over sequences of the mean squared log-partition."""
    means = [logits.exp().sum(-1).log().square().mean() for logits in own]
    return torch.stack([weight * mean for weight, mean in zip(weights, means, strict=True)]).sum()


def load_metrics(layers: Sequence[Sequence[Tensor]], towers: Towers, tower_ids: Sequence[int]) -> Mapping[str, float]:
    """Shares and entropies as ``load.expert_load`` names them; ``layers[l][row]`` are ``own_logits``."""
    metrics = {}
    for segment, name in enumerate(SEGMENTS):
        counts = torch.zeros(len(layers), towers.experts_per_tower)
        for layer, own in enumerate(layers):
            for row, tower in enumerate(tower_ids):
                if tower == segment:
                    chosen = own[row].topk(towers.top_k).indices.flatten()
                    counts[layer] += torch.bincount(chosen, minlength=towers.experts_per_tower)
        for expert in range(towers.experts_per_tower):
            metrics[f"{name}/expert_load/{expert}"] = float(counts[:, expert].sum() / counts.sum())
        shares = counts / counts.sum(1, keepdim=True)
        entropies = [-sum(p * math.log(p) for p in layer.tolist() if p) for layer in shares]
        metrics[f"{name}/expert_entropy"] = sum(entropies) / len(layers) / math.log(towers.experts_per_tower)
    return metrics
