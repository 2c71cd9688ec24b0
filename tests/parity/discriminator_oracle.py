"""The oracle of the discriminator tests: transformers' Qwen3-VL with plain torch experts, in one process, unsplit.

Its parameter names are those of a discriminator folder, so its gradients compare by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.losses.discriminator import PairRows
from prism_megatron.parity.discriminator import add_towers
from prism_megatron.parity.samples import IMAGE, PAD, image, row
from prism_megatron.parity.tiny import tiny_config, tiny_model
from prism_megatron.types import TokenSequence
from tests.parity.tiny_batches import real_tokens, shape_of

TOWERS = Towers(num_towers=2, experts_per_tower=4, top_k=2)
DROPOUT = 0.25
BALANCE = 0.1
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
    if balance:
        extras["load_balance_weight"] = torch.tensor([balance / case.sequence_counts[t] for t in towers])
    return dataclasses.replace(batch, extras=extras)


def pair_rows(batch: Batch) -> PairRows:
    assert batch.tower_ids_Q is not None
    return PairRows(batch.extras["reference_row"], batch.extras["is_rollout"], batch.tower_ids_Q)


def plain_discriminator(config: Mapping[str, Any], towers: Towers = TOWERS, *, seed: int = 1) -> Any:
    """``tiny_model`` with random experts and a random head instead of its MLPs and vocabulary."""
    model = tiny_model(config, seed=seed)
    torch.manual_seed(seed)
    return add_towers(model, shape_of(config), towers)


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
    """Scores without dropout of all rows in prompt order, the whole loss, the balance part, gradients by name."""

    scores: Tensor
    loss: float
    balance: float
    gradients: dict[str, Tensor]


def plain_step(model: Any, case: Case, *, balance: float = BALANCE) -> PlainResult:
    """Scores, loss (with dropout) and every gradient of one whole step as one padded batch."""
    batch = batch_of(case, range(len(case.prompts)))
    assert batch.tower_ids_Q is not None
    layers = [layer.mlp for layer in model.model.language_model.layers]
    for mlp in layers:
        mlp.tower_ids, mlp.lengths = batch.tower_ids_Q.tolist(), batch.lengths_Q.tolist()
    last_B_H = plain_hidden(model, batch)[torch.arange(len(batch.lengths_Q)), batch.lengths_Q - 1]
    scores = model.score(last_B_H)[:, 0]
    dropped = model.score(
        torch.stack([drop(h, key) for h, key in zip(last_B_H, batch.extras["dropout_key"], strict=True)])
    )
    loss = plain_pair_loss(dropped[:, 0], batch, case.pair_counts)
    balance_loss = torch.stack([mlp.balance for mlp in layers]).sum()
    (loss + balance * balance_loss).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return PlainResult(scores.detach(), loss.item(), balance * balance_loss.item(), gradients)


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
