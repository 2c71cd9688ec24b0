"""What every rank does: build the engine, run its share of the samples, and bring the outcome to rank 0.

Shape suffixes: L tokens of this context-parallel rank, B rows, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import PLAIN, Execution
from prism_megatron.engine.logprobs import VocabularyOutput
from prism_megatron.engine.provider import LossOutput, ModelProvider
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import all_gather_objects, gather_objects
from prism_megatron.parallel.layout import share_of
from prism_megatron.parity.compare import Outcome
from prism_megatron.parity.probe import Sample, probe_weights


class Piece(NamedTuple):
    """Logits of some tokens of one sample, for the vocabulary from ``first_column`` on."""

    sample: int
    token_T: npt.NDArray[np.int64]
    first_column: int
    logits_T_V: Tensor


@dataclass(frozen=True, eq=False)
class RankOutcome:
    """``outcome`` on rank 0, None elsewhere; ``spread`` is the largest ``gradient_spread`` of all ranks."""

    outcome: Outcome | None
    spread: float


def build_engine(
    world: World, folder: Path, shape: Qwen3VLShape, *, dtype: torch.dtype, execution: Execution = PLAIN
) -> MegatronEngine:
    """The folder's policy (see ``engine_of``)."""
    return engine_of(world, folder, Qwen3VLProvider(shape, execution=execution), name="policy", dtype=dtype)


def engine_of(world: World, folder: Path, provider: ModelProvider, *, name: str, dtype: torch.dtype) -> MegatronEngine:
    """A model with the folder's weights. Its optimizer is there for the gradient buffers and gives up its moments."""
    engine = MegatronEngine(
        name=name,
        provider=provider,
        world=world,
        dtype=dtype,
        optimizer=OptimizerConfig(),
        total_steps=1,
    )
    assert engine.optimizer is not None
    for part in engine.optimizer.chained_optimizers:
        part.optimizer.state.clear()
    engine.load_hf(open_weights(folder))
    return engine


def num_microbatches(parallel: ParallelConfig) -> int:
    """Micro-batches a data-parallel rank runs: two make a pipeline work, and the interleaved schedule wants pp."""
    if parallel.vpp > 1:
        return parallel.pp
    return 2 if parallel.pp > 1 else 1


def microbatches(
    samples: Sequence[Sample], shape: Qwen3VLShape, world: World, *, pack: bool, multiple_of: int | None = None
) -> list[Batch]:
    """This data-parallel rank's samples, collated; ``extras["sample"]`` numbers each among ``samples``.

    Lengths are padded to multiples of ``multiple_of``, by default of what the layout needs.
    """
    return [
        collate(
            [samples[number].row for number in share],
            pad_token_id=shape.pad_token_id,
            multiple_of=multiple_of or world.parallel.length_multiple,
            device=world.device,
            pack=pack,
            sequence_extras={"sample": list(share)},
        )
        for share in shares_of(samples, world)
    ]


def shares_of(samples: Sequence[Sample], world: World) -> list[Sequence[int]]:
    """The samples, by number, of each micro-batch of this data-parallel rank. ValueError where one would have none."""
    mine = share_of(range(len(samples)), index=world.dp_rank, count=world.dp_size)
    count = num_microbatches(world.parallel)
    shares = [share_of(mine, index=index, count=count) for index in range(count)]
    if not all(shares):
        raise ValueError(f"{len(samples)} samples are too few for {world.dp_size} x {count} micro-batches")
    return shares


def run_samples(
    engine: MegatronEngine,
    shape: Qwen3VLShape,
    samples: Sequence[Sample],
    *,
    pack: bool,
    multiple_of: int | None = None,
) -> RankOutcome:
    """Forward and backward of the probe loss over all samples, on all ranks."""
    world = engine.world
    pieces: list[Piece] = []

    def loss_of(output: VocabularyOutput, batch: Batch) -> LossOutput:
        logits_L_B_V = output.logits()
        weights_L_B_V = torch.zeros_like(logits_L_B_V, dtype=torch.float32)
        columns = logits_L_B_V.shape[-1]
        first = world.tp_rank * columns
        for number, at_L, row, token_T in _places(batch, world):
            weights = probe_weights(samples[number], shape.text.vocab)[token_T, first : first + columns]
            weights_L_B_V[at_L, row, : weights.shape[-1]] = weights.to(world.device)
            pieces.append(Piece(number, token_T, first, logits_L_B_V[at_L, row].detach().float().cpu()))
        return LossOutput(loss=(logits_L_B_V.float() * weights_L_B_V).sum())

    engine.forward_backward(microbatches(samples, shape, world, pack=pack, multiple_of=multiple_of), loss_of)
    gradients = gradients_of(engine, layout="transformers")  # as transformers has it in memory, whatever the folder's
    spread = max(all_gather_objects(engine.gradient_spread()))
    gathered = gather_objects(pieces)
    if gathered is None:
        return RankOutcome(None, spread)
    of_all = [piece for of_rank in gathered for piece in of_rank]
    return RankOutcome(Outcome(assemble(of_all, samples, shape.text.vocab), gradients), spread)


def gradients_of(engine: MegatronEngine, *, layout: ExpertLayout | None = None) -> dict[str, Tensor]:
    """Every gradient of the last pass by its Hugging Face name, on the CPU of rank 0; nothing on the others."""
    gradients: dict[str, Tensor] = {}
    for name, gradient in engine.export_gradients(layout=layout):
        if engine.world.is_main:
            gradients[name] = gradient.cpu()
    return gradients


def _places(batch: Batch, world: World) -> list[tuple[int, npt.NDArray[np.int64], int, npt.NDArray[np.int64]]]:
    """Of each sequence with tokens on this rank: its sample's number, where they are (outputs, row) and which."""
    tokens_L = batch.tokens_of(cp_size=world.parallel.cp, cp_rank=world.cp_rank)
    found = []
    numbers = batch.extras["sample"].tolist()
    for number, (row, start), length in zip(numbers, batch.places(), batch.lengths, strict=True):
        at_L = np.flatnonzero((tokens_L >= start) & (tokens_L < start + length))
        found.append((number, at_L, row, tokens_L[at_L] - start))
    return found


def assemble(pieces: Sequence[Piece], samples: Sequence[Sample], vocab: int) -> list[Tensor]:
    """Logits ``[T, V]`` of every sample. ValueError unless the pieces cover each logit exactly once."""
    logits = [torch.zeros(len(sample.row.token_ids), vocab) for sample in samples]
    counts = [torch.zeros(len(sample.row.token_ids), vocab, dtype=torch.uint8) for sample in samples]
    for piece in pieces:
        real = max(0, min(vocab - piece.first_column, piece.logits_T_V.shape[-1]))  # the others are padding
        columns = slice(piece.first_column, piece.first_column + real)
        token_T = torch.from_numpy(piece.token_T)
        logits[piece.sample][token_T, columns] = piece.logits_T_V[:, :real]
        counts[piece.sample][token_T, columns] += 1
    if not all(bool((count == 1).all()) for count in counts):
        raise ValueError("the ranks' logits do not cover every token and word exactly once")
    return logits
