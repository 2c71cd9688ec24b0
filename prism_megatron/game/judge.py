"""The discriminator's half of a round: one trunk pass scores references and rollouts and gives the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prism_megatron.advantages import ROUNDING
from prism_megatron.engine.batch import Batch, Extra
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.provider import LossOutput, PassOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.game.judged_rows import ScoreRow, collect_scores, discriminator_batch, prompt_slots, segment_slots
from prism_megatron.losses.discriminator import PairRows, discriminator_loss, pair_sums
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.microbatches import MicroBatch, of_rank, plan_pairs
from prism_megatron.types import TOWER_NAMES, TOWERS, PreferenceGroup


@dataclass(frozen=True)
class Judgement:
    """Scores by (group, tower, rollout or None for the reference), of the discriminator *before* its update.

    ``sums`` and ``cost`` are those of the pass that gave them, over all pairs that were learnt from; ``results`` has
    one entry for each update. Example: ``judgement.scores[2, PERCEPTION, None]`` is what the perception tower gave to
    the reference of group 2, and ``judgement.scores[2, PERCEPTION, 0]`` what it gave to its first rollout, if valid.
    """

    scores: Mapping[tuple[int, int, int | None], float]
    sums: Mapping[str, float]
    results: Sequence[StepResult]
    cost: TrunkCost
    rounding: float = ROUNDING[torch.float32]
    """relative difference of scores that the discriminator's dtype does not tell apart"""

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


@dataclass(frozen=True)
class JudgePlan:
    """What judging keeps fixed from step to step.

    Example: ``JudgePlan(form, tokens_per_microbatch=16384, score_regulariser=0.001, seed=42)``.
    """

    form: BatchFormat
    tokens_per_microbatch: int
    """bound of a micro-batch's token slots (see ``microbatches.plan_pairs``)"""
    score_regulariser: float
    """weight of the mean squared score in the loss"""
    seed: int
    """keys the dropout masks"""
    load_balance: float = 0.0
    """coefficient of the load-balancing loss per layer, tower and sequence"""
    updates_per_step: int = 1
    """most updates that any step takes: dropout masks are numbered by them"""
    score_rounding: float = ROUNDING[torch.float32]
    """relative difference of scores that the discriminator's dtype does not tell apart"""


def score(
    discriminator: MegatronEngine, groups: Sequence[PreferenceGroup], plan: JudgePlan, *, world: World, step: int
) -> Judgement:
    """Score every valid segment of ``groups``; nothing is trained."""
    return _Pass.over(groups, plan, world).score(discriminator, step, groups=len(groups))


def train(
    discriminator: MegatronEngine,
    groups: Sequence[PreferenceGroup],
    plan: JudgePlan,
    *,
    world: World,
    step: int,
    updates: int = 1,
    replayed: Sequence[PreferenceGroup] = (),
) -> Judgement:
    """Score every valid segment of ``groups`` and take ``updates`` Bradley-Terry steps on their pairs.

    The pairs of ``replayed`` groups are learnt from beside them. Scores are those before the first update. Without a
    valid pair in the whole step nothing is updated: AdamW would still decay weights and apply old momentum.
    """
    learnt = _Pass.over([*groups, *replayed], plan, world)
    if not updates:
        return learnt.score(discriminator, step, groups=len(groups))
    batches, keys = learnt.microbatches(step, update=0)
    output = discriminator.forward_backward(batches, learnt.loss)
    results: list[StepResult] = []
    if any(learnt.pairs):
        results.append(discriminator.step())
        for update in range(1, updates):
            discriminator.forward_backward(learnt.microbatches(step, update)[0], learnt.loss)
            results.append(discriminator.step())
    return learnt.judgement(output, keys, results, groups=len(groups))


@dataclass(frozen=True, eq=False)
class _Pass:
    """One trunk pass over the pairs of some groups, planned alike on every rank."""

    learnt: Sequence[PreferenceGroup]
    plan: JudgePlan
    world: World
    form: BatchFormat
    mine: Sequence[MicroBatch]
    """this data-parallel rank's micro-batches"""
    cost: TrunkCost
    pairs: Sequence[int]
    """of each tower, over all ranks"""

    @classmethod
    def over(cls, learnt: Sequence[PreferenceGroup], plan: JudgePlan, world: World) -> _Pass:
        # The load-balancing loss is a mean over whole sequences.
        form = replace(plan.form, share_prompts=False) if plan.load_balance else plan.form
        microbatches, cost = plan_scoring(learnt, form, plan.tokens_per_microbatch, world)
        mine = of_rank(microbatches, dp_rank=world.dp_rank, dp_size=world.dp_size)
        pairs = [sum(len(group.valid_rollouts) for group in learnt if tower in group.towers) for tower in TOWERS]
        return cls(learnt, plan, world, form, mine, cost, pairs)

    def score(self, discriminator: MegatronEngine, step: int, *, groups: int) -> Judgement:
        """The first ``groups`` of them, nothing is trained."""
        batches, keys = self.microbatches(step, update=0)
        return self.judgement(discriminator.forward(batches, self.loss), keys, [], groups=groups)

    def microbatches(self, step: int, update: int) -> tuple[list[Batch], list[Sequence[ScoreRow | None]]]:
        """With dropout masks of their own for every update."""
        sequences = [
            sum(1 + len(group.valid_rollouts) for group in self.learnt if tower in group.towers) for tower in TOWERS
        ]
        made = [
            discriminator_batch(
                self.learnt,
                parts,
                form=self.form,
                seed=self.plan.seed,
                step=step * self.plan.updates_per_step + update,
                load_balance=self.plan.load_balance,
                sequences_per_tower=sequences,
            )
            for parts in self.mine
        ]
        return [batch for batch, _ in made], [keys for _, keys in made]

    def loss(self, scores_2_B: Tensor, batch: Batch) -> LossOutput:
        """A micro-batch's part of the step's."""
        return game_loss(
            scores_2_B,
            batch,
            pair_counts=self.pairs,
            regulariser_coefficient=self.plan.score_regulariser,
            cp_size=self.world.parallel.cp,
        )

    def judgement(
        self,
        output: PassOutput,
        keys: Sequence[Sequence[ScoreRow | None]],
        results: Sequence[StepResult],
        *,
        groups: int,
    ) -> Judgement:
        """Scores of the first ``groups``, on every rank."""
        own = collect_scores([rows["scores"] for rows in output.rows], keys)
        scores = {
            key: score
            for mine in all_gather_objects(dict(own), group=self.world.groups.dp)
            for key, score in mine.items()
            if key[0] < groups
        }
        return Judgement(
            scores=scores,
            sums=output.sums,
            results=results,
            cost=self.cost,
            rounding=self.plan.score_rounding,
        )


def plan_scoring(
    groups: Sequence[PreferenceGroup], form: BatchFormat, tokens_per_microbatch: int, world: World
) -> tuple[Sequence[MicroBatch], TrunkCost]:
    """The micro-batches of all data-parallel ranks, the same on every rank, and what they cost."""
    references = [prompt_slots(group, form) + segment_slots(group, group.reference, form) for group in groups]
    rollouts = [{r: segment_slots(group, group.rollouts[r], form) for r in group.valid_rollouts} for group in groups]
    plan = plan_pairs(references, rollouts, budget=tokens_per_microbatch, rounds_of=world.microbatch_rounds)
    parts = [part for microbatch in plan for part in microbatch]
    unpadded = replace(form, length_multiple=1)
    unique_tokens = 0
    for group in groups:
        answers = [group.reference, *(group.rollouts[r] for r in group.valid_rollouts)]
        unique_tokens += prompt_slots(group, unpadded) + sum(
            segment_slots(group, answer, unpadded) for answer in answers
        )
    return plan, TrunkCost(
        trunk_tokens=sum(references[s.group] + sum(rollouts[s.group][r] for r in s.rollouts) for s in parts),
        unique_tokens=unique_tokens,
        references=len(parts),
    )


def game_loss(
    scores_2_B: Tensor, batch: Batch, *, pair_counts: Sequence[float], regulariser_coefficient: float, cp_size: int
) -> LossOutput:
    """Bradley-Terry per tower on the scores with dropout; metrics and the game's scores are those without.

    Each of the ``cp_size`` context-parallel ranks has all scores and the whole loss, and reports its share of the sums.
    """
    assert batch.tower_ids_Q is not None
    rows = PairRows(batch.extras[Extra.REFERENCE_ROW], batch.extras[Extra.IS_ROLLOUT], batch.tower_ids_Q)
    clean_B, dropped_B = scores_2_B[0].detach(), scores_2_B[1]
    result = discriminator_loss(
        dropped_B, rows, pair_counts=pair_counts, regulariser_coefficient=regulariser_coefficient
    )
    sums = {"discriminator_loss": result.loss.detach()}
    for tower, name in zip(TOWERS, TOWER_NAMES, strict=True):
        sums |= {f"{name}/{key}": value for key, value in pair_sums(clean_B, rows, tower=tower).items()}
    sums = {name: value / cp_size for name, value in sums.items()}
    return LossOutput(loss=result.loss, sums=sums, rows={"scores": clean_B})
