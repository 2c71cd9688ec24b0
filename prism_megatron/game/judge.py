"""The discriminator's half of a round: one trunk pass scores references and rollouts and gives the loss."""

from __future__ import annotations

import math
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
from prism_megatron.training.batches import (
    TOWER_NAMES,
    TOWERS,
    BatchFormat,
    ScoreRow,
    collect_scores,
    discriminator_batch,
    prompt_slots,
    segment_slots,
)
from prism_megatron.training.microbatches import MicroBatch, of_rank, plan_pairs
from prism_megatron.types import PreferenceGroup


@dataclass(frozen=True)
class Judgement:
    """Scores by (group, tower, rollout or None for the reference), of the discriminator *before* its update.

    ``sums`` and ``cost`` are those of the pass that gave them, over all pairs that were learnt from; ``results`` has
    one entry for each update.
    """

    scores: Mapping[tuple[int, int, int | None], float]
    sums: Mapping[str, float]
    results: Sequence[StepResult]
    cost: TrunkCost

    @property
    def finite(self) -> bool:
        """Whether every score is a number."""
        return all(math.isfinite(score) for score in self.scores.values())

    @property
    def result(self) -> StepResult | None:
        """The last update, or the first whose gradient was not finite; None if there was none."""
        dropped = [result for result in self.results if not result.updated]
        return next(iter(dropped or self.results[-1:]), None)


@dataclass(frozen=True)
class TrunkCost:
    """What one pass over a step ran through the trunk, over all data-parallel ranks."""

    trunk_tokens: int
    """token slots, padding and repeated references (each with its prompt) included"""
    unique_tokens: int
    """the same without padding and repetition: what has to be run"""
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
    updates: int = 1,
    replayed: Sequence[PreferenceGroup] = (),
) -> Judgement:
    """Score every valid segment of ``groups`` and take ``updates`` Bradley-Terry steps on their pairs.

    The pairs of ``replayed`` groups are learnt from beside them. ``game.freeze_discriminator`` allows no update, and
    without a valid pair in the whole step nothing is updated: AdamW would still decay weights and apply old momentum.

    ``tokens_per_microbatch`` bounds the token slots of a micro-batch (see ``microbatches.plan_pairs``);
    ``load_balance`` is the coefficient of the load-balancing loss per layer, tower and sequence.
    """
    learnt = [*groups, *replayed]
    pairs = [sum(len(group.valid_rollouts) for group in learnt if tower in group.towers) for tower in TOWERS]
    sequences = [sum(1 + len(group.valid_rollouts) for group in learnt if tower in group.towers) for tower in TOWERS]
    loss = partial(
        game_loss,
        pair_counts=pairs,
        regulariser_coefficient=game.score_regulariser,
        cp_size=world.parallel.cp,
    )
    if load_balance:  # a mean over whole sequences
        form = replace(form, share_prompts=False)
    plan, cost = plan_scoring(learnt, form, tokens_per_microbatch, world)
    mine = of_rank(plan, dp_rank=world.dp_rank, dp_size=world.dp_size)

    def microbatches(update: int) -> tuple[list[Batch], list[Sequence[ScoreRow | None]]]:
        """With dropout masks of their own for every update."""
        made = [
            discriminator_batch(
                learnt,
                shares,
                form=form,
                seed=seed,
                step=step * game.discriminator_updates_per_step + update,
                load_balance=load_balance,
                sequences_per_tower=sequences,
            )
            for shares in mine
        ]
        return [batch for batch, _ in made], [keys for _, keys in made]

    batches, keys = microbatches(0)
    learns = updates > 0 and not game.freeze_discriminator
    output = discriminator.forward_backward(batches, loss) if learns else discriminator.forward(batches, loss)
    results: list[StepResult] = []
    if learns and any(pairs):
        results.append(discriminator.step())
        for update in range(1, updates):
            discriminator.forward_backward(microbatches(update)[0], loss)
            results.append(discriminator.step())
    own = collect_scores([rows["scores"] for rows in output.rows], keys)
    scores = {
        key: score
        for share in all_gather_objects(dict(own), group=world.groups.dp)
        for key, score in share.items()
        if key[0] < len(groups)
    }
    return Judgement(scores=scores, sums=output.sums, results=results, cost=cost)


def plan_scoring(
    groups: Sequence[PreferenceGroup], form: BatchFormat, tokens_per_microbatch: int, world: World
) -> tuple[Sequence[MicroBatch], TrunkCost]:
    """The micro-batches of all data-parallel ranks, the same on every rank, and what they cost."""
    references = [prompt_slots(group, form) + segment_slots(group, group.reference, form) for group in groups]
    rollouts = [{r: segment_slots(group, group.rollouts[r], form) for r in group.valid_rollouts} for group in groups]
    plan = plan_pairs(references, rollouts, budget=tokens_per_microbatch, rounds_of=world.microbatch_rounds)
    shares = [share for microbatch in plan for share in microbatch]
    unpadded = replace(form, length_multiple=1)
    unique_tokens = 0
    for group in groups:
        answers = [group.reference, *(group.rollouts[r] for r in group.valid_rollouts)]
        unique_tokens += prompt_slots(group, unpadded) + sum(
            segment_slots(group, answer, unpadded) for answer in answers
        )
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
