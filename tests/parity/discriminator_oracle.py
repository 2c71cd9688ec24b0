"""The oracle of the discriminator tests: transformers' models, in one process, unsplit.

Dense MLPs are those of its Qwen3-VL and one pool of experts is its Qwen3-VL-MoE; towers are plain torch experts in the
former. Gradients carry the names of a discriminator folder.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.stages.discriminator import LoadBalanceScope
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.losses.discriminator import PairRows
from prism_megatron.parity.discriminator import PlainTowers, add_towers
from prism_megatron.parity.samples import IMAGE, PAD, image, row
from prism_megatron.parity.tiny import tiny_config, tiny_model
from prism_megatron.types import TokenSequence
from tests.parity.router_oracle import balance_loss as balance_loss_of
from tests.parity.router_oracle import gate_logits, load_metrics, merged, own_logits, z_loss
from tests.parity.tiny_batches import real_tokens, shape_of

TOWERS = Towers(num_towers=2, experts_per_tower=4, top_k=2)
POOL = Towers(num_towers=1, experts_per_tower=4, top_k=2)
DROPOUT = 0.25
BALANCE = 0.1
Z = 0.01
REGULARISER = 0.01


@dataclass(frozen=True)
class Case:
    """Rows of a step in prompt order; every prompt's rows are one micro-batch."""

    prompts: list[list[TokenSequence]]
    tower_ids: list[list[int]]
    reference_rows: list[list[int]]
    keys: list[list[int]]

    @property
    def pair_counts(self) -> list[float]:
        towers = [t for ids, refs in zip(self.tower_ids, self.reference_rows, strict=True)
                  for i, t in enumerate(ids) if refs[i] != i]  # fmt: skip
        return [float(towers.count(0)), float(towers.count(1))]

    @property
    def sequence_counts(self) -> list[int]:
        flat = [t for ids in self.tower_ids for t in ids]
        return [flat.count(0), flat.count(1)]


def game_case() -> Case:
    """Two prompts with unequal numbers of rollouts; all rows of a prompt show its image."""
    rng = np.random.default_rng(5)
    case = Case([], [], [], [])
    for grid, rollouts in (((1, 4, 4), (2, 1)), ((1, 4, 8), (1, 3))):
        shown = image(rng, grid)
        rows: list[TokenSequence] = []
        towers: list[int] = []
        references: list[int] = []
        for tower, count in enumerate(rollouts):
            reference = len(rows)
            for _ in range(count + 1):
                rows.append(row(rng, 3, shown, int(rng.integers(3, 12))))
                towers.append(tower)
                references.append(reference)
        case.prompts.append(rows)
        case.tower_ids.append(towers)
        case.reference_rows.append(references)
        case.keys.append([int(key) for key in rng.integers(0, 2**62, size=len(rows))])
    return case


def batch_of(
    case: Case, prompts: Sequence[int], *, multiple_of: int = 1, balance: float = BALANCE, pack: bool = False
) -> Batch:
    """One micro-batch of several prompts; ``balance`` 0 leaves the load-balancing weights out."""
    rows: list[TokenSequence] = []
    towers: list[int] = []
    references: list[int] = []
    keys: list[int] = []
    for p in prompts:
        references += [len(rows) + r for r in case.reference_rows[p]]
        rows += case.prompts[p]
        towers += case.tower_ids[p]
        keys += case.keys[p]
    batch = collate(
        rows,
        pad_token_id=PAD,
        multiple_of=multiple_of,
        device=torch.device("cpu"),
        tower_ids=towers,
        pack=pack,
    )
    extras = {
        "reference_row": torch.tensor(references),
        "is_rollout": torch.tensor([r != i for i, r in enumerate(references)]),
        "dropout_key": torch.tensor(keys),
    }
    extras["sequence_share"] = torch.tensor([1.0 / case.sequence_counts[t] for t in towers])
    if balance:
        extras["load_balance_weight"] = balance * extras["sequence_share"]
    return dataclasses.replace(batch, extras=extras, host_extras={"dropout_key": np.array(keys, dtype=np.int64)})


def pair_rows(batch: Batch) -> PairRows:
    assert batch.tower_ids_Q is not None
    return PairRows(batch.extras["reference_row"], batch.extras["is_rollout"], batch.tower_ids_Q)


def plain_discriminator(config: Mapping[str, Any], towers: Towers | None = TOWERS, *, seed: int = 1) -> Any:
    """``tiny_model`` with random experts, or none, and a random head instead of its vocabulary."""
    torch.manual_seed(seed)
    if towers is None or towers.num_towers > 1:
        return add_towers(tiny_model(config, seed=seed), shape_of(config), towers)
    sizes = {"num_experts": towers.num_experts, "num_experts_per_tok": towers.top_k}
    pool_config = tiny_config(num_experts=towers.num_experts)
    pool_config["text_config"] |= {**sizes, "moe_intermediate_size": config["text_config"]["intermediate_size"]}
    return add_towers(tiny_model(pool_config, seed=seed), shape_of(config), None)


def in_folder_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model of transformers (weights or gradients), its fused experts one by one."""
    named = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            named[name] = tensor
            continue
        folder = name.rsplit(".", 1)[0]
        for expert, matrix in enumerate(tensor):
            parts = (
                {"down": matrix}
                if name.endswith("down_proj")
                else dict(zip(("gate", "up"), matrix.chunk(2), strict=True))
            )
            named |= {f"{folder}.{expert}.{part}_proj.weight": of for part, of in parts.items()}
    return named


def plain_hidden(model: Any, batch: Batch) -> Tensor:
    """Last hidden states ``[B, S, H]`` after the final norm; the vision tower runs once per row that shows an image."""
    ids = batch.input_ids_B_S
    grids = batch.grid_thw_N_3
    patches = [torch.from_numpy(image.pixel_values_P_D) for image in batch.images]
    shown = [n for images in batch.images_by_sequence for n in images]
    hidden_B_S_H: Tensor = model.model(
        input_ids=ids,
        attention_mask=real_tokens(batch).long(),
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.cat([patches[n] for n in shown]),
        image_grid_thw=grids[shown],
        use_cache=False,
    ).last_hidden_state
    return hidden_B_S_H


@dataclass(frozen=True)
class PlainResult:
    """Scores without dropout of all rows in prompt order, the three losses, expert loads, gradients by name."""

    scores: Tensor
    loss: float
    balance: float
    z: float
    loads: Mapping[str, float]
    gradients: dict[str, Tensor]


def plain_step(
    model: Any,
    case: Case,
    towers: Towers | None = TOWERS,
    *,
    balance: float = BALANCE,
    scope: LoadBalanceScope = "sequence",
    z: float = Z,
) -> PlainResult:
    """Scores, losses (with dropout) and every gradient of one whole step as one padded batch."""
    batch = batch_of(case, range(len(case.prompts)))
    assert batch.tower_ids_Q is not None
    tower_ids = batch.tower_ids_Q.tolist()
    for module in model.modules():
        if isinstance(module, PlainTowers):
            module.tower_ids = tower_ids
    with gate_logits(model, batch) as logits:
        hidden = plain_hidden(model, batch)
    last_B_H = hidden[torch.arange(len(batch.lengths_Q)), batch.lengths_Q - 1]
    scores = model.score(last_B_H)[:, 0]
    dropped = model.score(
        torch.stack([drop(h, key) for h, key in zip(last_B_H, batch.extras["dropout_key"], strict=True)])
    )
    loss = plain_pair_loss(dropped[:, 0], batch, case.pair_counts)
    balance_loss, z_total, loads = torch.zeros(()), torch.zeros(()), {}
    if towers is not None:
        layers = [own_logits(of_layer, batch, towers) for of_layer in logits]
        shares, pools = batch.extras["sequence_share"].tolist(), [t % towers.num_towers for t in tower_ids]
        starts = np.cumsum([0, *map(len, case.prompts)])
        microbatches = [range(start, end) for start, end in itertools.pairwise(starts)]
        for own in layers:
            sets, weights = (own, shares) if scope == "sequence" else merged(own, shares, pools, microbatches)
            balance_loss = balance_loss + balance * balance_loss_of(sets, weights, towers)
            z_total = z_total + z * z_loss(own, shares)
        loads = dict(load_metrics(layers, towers, tower_ids))
    (loss + balance_loss + z_total).backward()
    gradients = in_folder_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return PlainResult(scores.detach(), loss.item(), balance_loss.item(), z_total.item(), loads, gradients)


def drop(hidden_H: Tensor, key: Tensor) -> Tensor:
    """The head's dropout, as documented: Philox of the row's key, uniform draws below the rate are dropped."""
    draws = np.random.Generator(np.random.Philox(int(key))).random(len(hidden_H))
    return hidden_H * torch.from_numpy((draws >= DROPOUT).astype(np.float32)) / (1.0 - DROPOUT)


def plain_pair_loss(scores: Tensor, batch: Batch, counts: Sequence[float]) -> Tensor:
    """Bradley-Terry per tower and the four-term regulariser, pair by pair."""
    rows = pair_rows(batch)
    loss = torch.zeros(())
    for b in range(len(scores)):
        if rows.is_rollout_B[b]:
            reference = scores[rows.reference_row_B[b]]
            count = counts[int(rows.tower_ids_B[b])]
            loss = loss - functional.logsigmoid(reference - scores[b]) / count
            loss = loss + REGULARISER * (reference**2 + scores[b] ** 2) / count / 4.0
    return loss


class StateSource(TensorSource):
    """A state dict as a ``TensorSource``."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)

    def names(self) -> Sequence[str]:
        return list(self.state)

    def get(self, name: str) -> Tensor:
        return self.state[name]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.state.items()}


def tiny_shape() -> Qwen3VLShape:
    return shape_of(tiny_config())
