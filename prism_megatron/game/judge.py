"""The discriminator's half of a round: one pass over the trunk scores references and rollouts and gives the loss.

Where references have micro-batches of their own (``scoring_plan``) it takes three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from prism_megatron.advantages import ROUNDING
from prism_megatron.engine.batch import Batch, Extra
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.provider import LossOutput, PassOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.game.judged_rows import (
    ReferenceScore,
    ScoreMicroBatch,
    ScoreRow,
    collect_scores,
    discriminator_batch,
)
from prism_megatron.game.scoring_plan import ScoringPlan, TrunkCost, plan_scoring
from prism_megatron.losses.discriminator import PairRows, discriminator_loss, pair_sums
from prism_megatron.parallel.collectives import all_gather_objects, sum_numbers
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.microbatches import of_rank
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
    return train(discriminator, groups, plan, world=world, step=step, updates=0)


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
    learnt = _Pass.over([*groups, *replayed], plan, world, learns=updates > 0)
    found = learnt.run(discriminator, step)
    results: list[StepResult] = []
    if updates and any(learnt.pair_counts):
        results.append(discriminator.step())
        for update in range(1, updates):
            learnt.run(discriminator, step, update)
            results.append(discriminator.step())
    return learnt.judgement(found, results, groups=len(groups))


@dataclass(frozen=True)
class _Found:
    """Scores and sums of a pass."""

    scores: Mapping[tuple[int, int, int | None], float]
    sums: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class _Pass:
    """One trunk pass over the pairs of some groups, planned alike on every rank."""

    learnt: Sequence[PreferenceGroup]
    plan: JudgePlan
    world: World
    scoring: ScoringPlan
    pair_counts: Sequence[int]
    """of each tower, over all ranks"""

    @classmethod
    def over(cls, learnt: Sequence[PreferenceGroup], plan: JudgePlan, world: World, *, learns: bool) -> _Pass:
        scoring = plan_scoring(
            learnt,
            plan.form,
            tokens_per_microbatch=plan.tokens_per_microbatch,
            rounds_of=world.microbatch_rounds,
            ranks=world.dp_size,
            learns=learns,
        )
        pairs = [sum(len(group.valid_rollouts) for group in learnt if tower in group.towers) for tower in TOWERS]
        return cls(learnt, plan, world, scoring, pairs)

    def run(self, discriminator: MegatronEngine, step: int, update: int = 0) -> _Found:
        """Scores of everything, and gradients where it is to learn, with dropout masks of their own for every update.

        See ``scoring_plan`` for the two ways.
        """
        batches_of = partial(self._batches, number=step * self.plan.updates_per_step + update)
        run = discriminator.forward_backward if self.scoring.cost.learns else discriminator.forward
        if not self.scoring.references:
            batches, keys = batches_of(self.scoring.pairs)
            output = run(batches, self._loss)
            return _Found(self._gathered(output, keys), output.sums)
        learns = self.scoring.cost.learns

        batches, keys = batches_of(self.scoring.references)
        looked = discriminator.forward(batches, _scores_alone, more=not learns)
        references = self._known(looked, keys)

        batches, pair_keys = batches_of(self.scoring.pairs, references=references)
        output = run(batches, self._loss, more=learns)
        scores: dict[tuple[int, int, int | None], float] = {
            (*unit, None): known.clean for unit, known in references.items()
        }
        scores |= {key: score for key, score in self._gathered(output, pair_keys).items() if key[2] is not None}
        if not learns:
            return _Found(scores, output.sums)

        batches, _ = batches_of(self.scoring.references, slopes=self._slopes(output))
        counted = discriminator.forward_backward(batches, _weighed_scores, adds=True)
        return _Found(scores, {**output.sums, **counted.sums})

    def judgement(self, found: _Found, results: Sequence[StepResult], *, groups: int) -> Judgement:
        """Scores of the first ``groups``."""
        return Judgement(
            scores={key: score for key, score in found.scores.items() if key[0] < groups},
            sums=found.sums,
            results=results,
            cost=self.scoring.cost,
            rounding=self.plan.score_rounding,
        )

    def _own(self, plan: Sequence[ScoreMicroBatch]) -> Sequence[ScoreMicroBatch]:
        return of_rank(plan, dp_rank=self.world.dp_rank, dp_size=self.world.dp_size)

    def _batches(
        self,
        plan: Sequence[ScoreMicroBatch],
        *,
        number: int,
        references: Mapping[tuple[int, int], ReferenceScore] | None = None,
        slopes: Mapping[tuple[int, int], float] | None = None,
    ) -> tuple[list[Batch], list[Sequence[ScoreRow | None]]]:
        """This data-parallel rank's micro-batches; dropout is keyed by ``number``."""
        sequences = [
            sum(1 + len(group.valid_rollouts) for group in self.learnt if tower in group.towers) for tower in TOWERS
        ]
        made = [
            discriminator_batch(
                self.learnt,
                parts,
                form=self.plan.form,
                seed=self.plan.seed,
                step=number,
                load_balance=self.plan.load_balance,
                sequences_per_tower=sequences,
                references=references,
                slopes=slopes,
            )
            for parts in self._own(plan)
        ]
        return [batch for batch, _ in made], [keys for _, keys in made]

    def _loss(self, scores_2_B: Tensor, batch: Batch) -> LossOutput:
        """A micro-batch's part of the step's."""
        return game_loss(
            scores_2_B,
            batch,
            pair_counts=self.pair_counts,
            regulariser_coefficient=self.plan.score_regulariser,
            cp_size=self.world.parallel.cp,
        )

    def _gathered(
        self, output: PassOutput, keys: Sequence[Sequence[ScoreRow | None]]
    ) -> dict[tuple[int, int, int | None], float]:
        """Scores of all data-parallel ranks' sequences."""
        own = collect_scores([of_batch["scores"] for of_batch in output.rows], keys)
        everyone = all_gather_objects(dict(own), group=self.world.groups.dp)
        return {key: score for of_rank_ in everyone for key, score in of_rank_.items()}

    def _known(
        self, output: PassOutput, keys: Sequence[Sequence[ScoreRow | None]]
    ) -> dict[tuple[int, int], ReferenceScore]:
        """What each reference got on the one data-parallel rank that has it."""
        clean, dropped = (self._units(), self._units())
        for parts, of_batch, own in zip(self._own(self.scoring.references), output.rows, keys, strict=True):
            repeated = {(part.group, part.tower) for part in parts if part.repeated}
            scores = zip(own, of_batch["scores"].tolist(), of_batch["dropped"].tolist(), strict=True)
            for key, score, with_dropout in scores:
                if key is not None and (unit := (key.group, key.tower)) not in repeated:
                    clean[unit], dropped[unit] = score, with_dropout
        clean, dropped = (self._over_ranks(values) for values in (clean, dropped))
        return {unit: ReferenceScore(clean[unit], dropped[unit]) for unit in clean}

    def _slopes(self, output: PassOutput) -> dict[tuple[int, int], float]:
        """What the loss changes by with each reference's score, over all rollouts of all data-parallel ranks."""
        slopes = self._units()
        for parts, of_batch in zip(self._own(self.scoring.pairs), output.rows, strict=True):
            found = of_batch["slopes"].tolist()
            for number, part in enumerate(parts):
                slopes[part.group, part.tower] += found[number]
        return self._over_ranks(slopes)

    def _units(self) -> dict[tuple[int, int], float]:
        """Zero for each group and tower."""
        return {(g, tower): 0.0 for g, group in enumerate(self.learnt) for tower in group.towers}

    def _over_ranks(self, values: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
        """Sums over data-parallel ranks."""
        named = {f"{group}/{tower}": value for (group, tower), value in values.items()}
        sums = sum_numbers(named, device=self.world.device, group=self.world.groups.dp)
        return {(group, tower): sums[f"{group}/{tower}"] for group, tower in values}


def _scores_alone(scores_2_B: Tensor, _batch: Batch) -> LossOutput:
    return LossOutput(scores_2_B.new_zeros(()), rows={"scores": scores_2_B[0], "dropped": scores_2_B[1]})


def _weighed_scores(scores_2_B: Tensor, batch: Batch) -> LossOutput:
    """A loss whose gradient in the scores with dropout is what the step's has there."""
    return LossOutput((scores_2_B[1] * batch.extras[Extra.SCORE_SLOPE]).sum())


def game_loss(
    scores_2_B: Tensor, batch: Batch, *, pair_counts: Sequence[float], regulariser_coefficient: float, cp_size: int
) -> LossOutput:
    """Bradley-Terry per tower on the scores with dropout; metrics and the game's scores are those without.

    References that were scored in another pass stand behind the micro-batch's own scores; ``slopes`` among the rows
    are the loss's in them. Each of the ``cp_size`` context-parallel ranks has all scores and the whole loss, and
    reports its share of the sums.
    """
    assert batch.tower_ids_Q is not None
    known_2_R = _known_scores(batch)
    clean_B, dropped_B = (torch.cat(of) for of in zip((scores_2_B[0].detach(), scores_2_B[1]), known_2_R, strict=True))
    others = len(known_2_R[1])
    rows = PairRows(
        functional.pad(batch.extras[Extra.REFERENCE_ROW], (0, others)),
        functional.pad(batch.extras[Extra.IS_ROLLOUT], (0, others)),
        functional.pad(batch.tower_ids_Q, (0, others)),
    )
    result = discriminator_loss(
        dropped_B, rows, pair_counts=pair_counts, regulariser_coefficient=regulariser_coefficient
    )
    sums = {"discriminator_loss": result.loss.detach()}
    for tower, name in zip(TOWERS, TOWER_NAMES, strict=True):
        sums |= {f"{name}/{key}": value for key, value in pair_sums(clean_B, rows, tower=tower).items()}
    sums = {name: value / cp_size for name, value in sums.items()}
    found = {"scores": scores_2_B[0].detach()}
    if others and result.loss.requires_grad:
        (found["slopes"],) = torch.autograd.grad(result.loss, known_2_R[1], retain_graph=True)
    return LossOutput(loss=result.loss, sums=sums, rows=found)


def _known_scores(batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores of references that are not in the micro-batch, without dropout and with it, ``[R]`` each."""
    if Extra.KNOWN_SCORES not in batch.extras:
        nothing = torch.empty(0, device=batch.input_ids_B_S.device)
        return nothing, nothing
    dropped = batch.extras[Extra.KNOWN_DROPPED].detach()
    return batch.extras[Extra.KNOWN_SCORES], dropped.requires_grad_(torch.is_grad_enabled())
