"""The discriminator's half of a round: one trunk pass scores references and rollouts and gives the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from prism_megatron.config.game import GameConfig
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.provider import LossOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.losses.discriminator import PairRows, discriminator_loss, pair_sums
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.stages.batches import (
    TOWER_NAMES,
    TOWERS,
    BatchFormat,
    collect_scores,
    discriminator_batch,
    segment_slots,
)
from prism_megatron.stages.microbatches import MicroBatch, of_rank, plan_pairs
from prism_megatron.types import PreferenceGroup


@dataclass(frozen=True)
class Judgement:
    """Scores by (group, tower, rollout or None for the reference), of the discriminator *before* its update."""

    scores: Mapping[tuple[int, int, int | None], float]
    sums: Mapping[str, float]
    result: StepResult | None
    cost: TrunkCost


@dataclass(frozen=True)
class TrunkCost:
    """What one pass over a step ran through the trunk, over all data-parallel ranks."""

    trunk_tokens: int
    """token slots, padding and repeated references included"""
    unique_tokens: int
    """tokens of every judged sequence, once"""
    references: int
    """copies of references; the step's pairs over these are the rollouts that share one"""


def judge_and_train(
    discriminator: MegatronEngine,
    groups: Sequence[PreferenceGroup],
    game: GameConfig,
    *,
    world: World,
    form: BatchFormat,
    seed: int,
    step: int,
    tokens_per_microbatch: int,
    load_balance: float,
) -> Judgement:
    """Score every valid segment and, unless the discriminator is frozen, take one Bradley-Terry step on the pairs.

    Without a valid pair in the whole step nothing is updated: AdamW would still decay weights and apply old momentum.

    ``tokens_per_microbatch`` bounds the token slots of a micro-batch (see ``microbatches.plan_pairs``);
    ``load_balance`` is the coefficient of the load-balancing loss per layer, tower and sequence.
    """
    pairs = [sum(len(group.valid_rollouts) for group in groups if tower in group.towers) for tower in TOWERS]
    sequences = [sum(1 + len(group.valid_rollouts) for group in groups if tower in group.towers) for tower in TOWERS]
    loss = partial(
        game_loss,
        pair_counts=pairs,
        regulariser_coefficient=game.score_regulariser,
        cp_size=world.parallel.cp,
    )
    plan, cost = plan_scoring(groups, form, tokens_per_microbatch, world)
    batches, keys = [], []
    for shares in of_rank(plan, dp_rank=world.dp_rank, dp_size=world.dp_size):
        batch, batch_keys = discriminator_batch(
            groups,
            shares,
            form=form,
            seed=seed,
            step=step,
            load_balance=load_balance,
            sequences_per_tower=sequences,
        )
        batches.append(batch)
        keys.append(batch_keys)
    if game.freeze_discriminator:
        output, result = discriminator.forward(batches, loss), None
    else:
        output = discriminator.forward_backward(batches, loss)
        result = discriminator.step() if any(pairs) else None
    own = collect_scores([rows["scores"] for rows in output.rows], keys)
    scores = {
        key: score for share in all_gather_objects(dict(own), group=world.groups.dp) for key, score in share.items()
    }
    return Judgement(scores=scores, sums=output.sums, result=result, cost=cost)


def plan_scoring(
    groups: Sequence[PreferenceGroup], form: BatchFormat, tokens_per_microbatch: int, world: World
) -> tuple[Sequence[MicroBatch], TrunkCost]:
    """The micro-batches of all data-parallel ranks, the same on every rank, and what they cost."""
    references = [segment_slots(group, group.reference, form) for group in groups]
    rollouts = [{r: segment_slots(group, group.rollouts[r], form) for r in group.valid_rollouts} for group in groups]
    plan = plan_pairs(references, rollouts, budget=tokens_per_microbatch, rounds_of=world.microbatch_rounds)
    shares = [share for microbatch in plan for share in microbatch]
    unpadded = replace(form, length_multiple=1)
    unique_tokens = 0
    for group in groups:
        answers = [group.reference, *(group.rollouts[r] for r in group.valid_rollouts)]
        unique_tokens += sum(segment_slots(group, answer, unpadded) for answer in answers)
    return plan, TrunkCost(
        trunk_tokens=sum(references[s.group] + sum(rollouts[s.group][r] for r in s.rollouts) for s in shares),
        unique_tokens=unique_tokens,
        references=len(shares),
    )


def game_loss(
    scores_2_B: Tensor, batch: Batch, *, pair_counts: Sequence[float], regulariser_coefficient: float, cp_size: int
) -> LossOutput:
    """Bradley-Terry per tower on the scores with dropout; metrics and the game's scores are those without.

    Each of the ``cp_size`` context-parallel ranks has all scores and the whole loss, and reports its share of the sums.
    """
    assert batch.tower_ids_Q is not None
    rows = PairRows(batch.extras["reference_row"], batch.extras["is_rollout"], batch.tower_ids_Q)
    clean_B, dropped_B = scores_2_B[0].detach(), scores_2_B[1]
    result = discriminator_loss(
        dropped_B, rows, pair_counts=pair_counts, regulariser_coefficient=regulariser_coefficient
    )
    sums = {"discriminator_loss": result.loss.detach()}
    for tower, name in zip(TOWERS, TOWER_NAMES, strict=True):
        sums |= {f"{name}/{key}": value for key, value in pair_sums(clean_B, rows, tower=tower).items()}
    sums = {name: value / cp_size for name, value in sums.items()}
    return LossOutput(loss=result.loss, sums=sums, rows={"scores": clean_B})
