"""What every rank does to verify a discriminator folder: its share of the samples, each judged by every tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model_providers.moe_discriminator.folder import read_variant
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import all_gather_objects, gather_objects
from prism_megatron.parity.compare import Outcome
from prism_megatron.parity.discriminator import num_judges, score_weight
from prism_megatron.parity.probe import Sample
from prism_megatron.parity.ranks import RankOutcome, engine_of, gradients_of, shares_of


def build_discriminator(
    world: World, folder: Path, *, dtype: torch.dtype, recompute: RecomputeConfig
) -> MegatronEngine:
    """The folder's discriminator, whose head drops nothing, and which is shown images whatever its modality."""
    shape, towers = Qwen3VLShape.from_folder(folder), read_variant(folder).towers
    provider = DiscriminatorProvider(shape, towers, head_dropout=0.0, execution=Execution(recompute))
    return engine_of(world, folder, provider, name="discriminator", dtype=dtype)


def run_discriminator(
    engine: MegatronEngine, shape: Qwen3VLShape, towers: Towers | None, samples: Sequence[Sample], *, pack: bool
) -> RankOutcome:
    """Forward and backward of the probe loss over all samples and towers, on all ranks."""
    towers_each = num_judges(towers)
    world = engine.world
    found: dict[tuple[int, int], Tensor] = {}

    def loss_of(scores_2_B: Tensor, batch: Batch) -> LossOutput:
        assert batch.tower_ids_Q is not None
        rows = list(zip(batch.extras["sample"].tolist(), batch.tower_ids_Q.tolist(), strict=True))
        weights_B = torch.tensor([score_weight(samples[number], tower, towers_each) for number, tower in rows])
        found.update(zip(rows, scores_2_B[0].detach().float().cpu(), strict=True))
        return LossOutput(loss=(scores_2_B[1] * weights_B.to(world.device)).sum())

    engine.forward_backward(_microbatches(samples, shape, towers_each, world, pack=pack), loss_of)
    gradients = gradients_of(engine)
    spread = max(all_gather_objects(engine.gradient_spread()))
    gathered = gather_objects(found)
    if gathered is None:
        return RankOutcome(None, spread)
    scores = {place: score for of_rank in gathered for place, score in of_rank.items()}
    judged = [
        torch.stack([scores[number, tower] for tower in range(towers_each)])[None] for number in range(len(samples))
    ]
    return RankOutcome(Outcome(judged, gradients), spread)


def _microbatches(
    samples: Sequence[Sample], shape: Qwen3VLShape, towers: int, world: World, *, pack: bool
) -> list[Batch]:
    """This data-parallel rank's samples, a sequence for each tower."""
    return [
        collate(
            [samples[number].row for number in share for _ in range(towers)],
            pad_token_id=shape.pad_token_id,
            multiple_of=world.parallel.length_multiple,
            device=world.device,
            tower_ids=[tower for _ in share for tower in range(towers)],
            pack=pack,
            sequence_extras={"sample": [number for number in share for _ in range(towers)]},
        )
        for share in shares_of(samples, world)
    ]
