"""The policy's half of a step: one or several gradient steps on an experience, whatever its advantages come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.provider import LossOutput, PassOutput, StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.training.batches import BatchFormat, PlannedBatch, planned_batch
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.training.microbatches import of_rank, plan_pairs
from prism_megatron.training.policy_loss import denominators_of, policy_loss
from prism_megatron.training.token_logprobs import (
    TokenScores,
    corrected,
    token_scores,
    with_old_logprobs,
    with_reference_logprobs,
)

_MEANS = ("policy_loss", "entropy")
"""Figures of one update that are means already."""


@dataclass(frozen=True)
class UpdatePlan:
    """What updating a policy keeps fixed from step to step."""

    objective: PolicyObjective
    form: BatchFormat
    tokens_per_microbatch: int
    """token slots that one forward and backward pass holds at most"""
    temperature: float = 1.0
    """log-probs are those under the temperature that the rollouts were drawn at"""


@dataclass(frozen=True)
class MiniUpdate:
    """One optimizer step: figures over its mini-batch, equal on every rank, and what became of it."""

    sums: Mapping[str, float]
    kept_tokens: int
    result: StepResult


@dataclass(frozen=True)
class PolicyUpdate:
    """Figures of the whole step, equal on every rank; ``result`` is None where the policy was not updated.

    Where the step has several ``updates``, ``sums`` are over all of them, with means for the loss and the entropy;
    those of mismatch count each rollout once. ``result`` is then the last, or the first whose gradient was dropped.
    """

    sums: Mapping[str, float]
    result: StepResult | None
    updates: Sequence[MiniUpdate] = ()

    @property
    def updated(self) -> bool:
        """Whether the policy is another one now: a gradient that is not finite changes nothing."""
        results = [update.result for update in self.updates] or ([] if self.result is None else [self.result])
        return any(result.updated for result in results)


def update_policy(policy: MegatronEngine, experience: Experience, plan: UpdatePlan, *, world: World) -> PolicyUpdate:
    """The optimizer steps that ``plan.objective`` asks for; on-policy where ``experience.version`` drew the rows.

    Log-probs before the first update are found where they are needed and the rows do not bring them. Where a correction
    leaves out all tokens of a mini-batch there is no step, and where it leaves out those of all of them the policy is
    only measured. Raises ValueError for rows that cannot be divided into mini-batches.
    """
    objective = plan.objective
    if objective.needs_old_logprobs and any(row.old_logprobs is None for row in experience.rows):
        experience = with_old_logprobs(experience, scores_of(policy, experience, plan, world=world))
    experience, correction = corrected(experience, objective.correction)
    updates: list[MiniUpdate] = []
    for _ in range(objective.epochs):
        for part in experience.parts(objective.mini_batches):
            if not part.kept_tokens:  # AdamW's momentum would move the weights all the same
                continue
            output = policy.forward_backward(policy_batches(part, plan, world=world), _loss(part, plan, world))
            updates.append(MiniUpdate(_figures(output), part.kept_tokens, policy.step()))
    if not updates:
        measured = measure_policy(policy, experience, plan, world=world)
        return PolicyUpdate({**measured.sums, **correction}, None)
    dropped = [update.result for update in updates if not update.result.updated]
    result = next(iter(dropped or [updates[-1].result]))
    return PolicyUpdate({**_over(updates, objective.mini_batches), **correction}, result, updates)


def measure_policy(policy: MegatronEngine, experience: Experience, plan: UpdatePlan, *, world: World) -> PolicyUpdate:
    """The figures of an uncorrected :func:`update_policy` of one update, of a policy that stays as it is."""
    output = policy.forward(policy_batches(experience, plan, world=world), _loss(experience, plan, world))
    return PolicyUpdate(_figures(output), None)


def scores_of(policy: MegatronEngine, experience: Experience, plan: UpdatePlan, *, world: World) -> list[TokenScores]:
    """Log-probs and entropies of every token under ``policy`` as it is now, by the rows of ``experience``."""
    planned = planned_batches(experience, plan, world=world)
    return token_scores(policy, planned, experience.rows, temperature=plan.temperature, world=world)


def beside_reference(
    reference: MegatronEngine, experience: Experience, plan: UpdatePlan, *, world: World
) -> Experience:
    """The experience with log-probs of a frozen policy, for ``plan.objective.kl``."""
    return with_reference_logprobs(experience, scores_of(reference, experience, plan, world=world))


def _loss(experience: Experience, plan: UpdatePlan, world: World) -> partial[LossOutput]:
    denominators = denominators_of(experience, plan.objective)
    return partial(
        policy_loss,
        world=world,
        objective=plan.objective,
        denominators=denominators,
        temperature=plan.temperature,
    )


def _figures(output: PassOutput) -> dict[str, float]:
    return {**output.sums, **output.maxima}


def _over(updates: Sequence[MiniUpdate], mini_batches: int) -> dict[str, float]:
    """Figures of one update as they are; of several added up, but for means and the largest."""
    if len(updates) == 1:
        return dict(updates[0].sums)
    whole: dict[str, float] = {}
    for number, update in enumerate(updates):
        for name, value in update.sums.items():
            if name in _MEANS:
                whole[name] = whole.get(name, 0.0) + value / len(updates)
            elif name.endswith("/max"):
                whole[name] = max(value, whole.get(name, value))
            elif number < mini_batches or not name.startswith(("gap/", "importance/")):
                whole[name] = whole.get(name, 0.0) + value
    return whole


def policy_batches(experience: Experience, plan: UpdatePlan, *, world: World) -> list[Batch]:
    """This data-parallel rank's micro-batches of prompts and rollouts, packed up to the budget."""
    return [one.batch for one in planned_batches(experience, plan, world=world)]


def planned_batches(experience: Experience, plan: UpdatePlan, *, world: World) -> list[PlannedBatch]:
    """The same with the rows that lie in each."""
    rows, form = experience.rows, plan.form
    microbatches = plan_microbatches(
        rows, form, budget=plan.tokens_per_microbatch, rounds_of=world.microbatch_rounds, ranks=world.dp_size
    )
    return [
        planned_batch(numbers, rows, version=experience.version, form=form)
        for numbers in of_rank(microbatches, dp_rank=world.dp_rank, dp_size=world.dp_size)
    ]


def plan_microbatches(
    rows: Sequence[ExperienceRow], form: BatchFormat, *, budget: int, rounds_of: int, ranks: int = 1
) -> list[tuple[int, ...]]:
    """Numbers of the rows of each micro-batch, those of a prompt together, the shortest first.

    Neighbours of one prompt share it where ``form`` says so. A micro-batch that only makes up the number has none.
    """
    groups = [[number for number, _ in same] for _, same in groupby(enumerate(rows), key=lambda one: id(one[1].prompt))]
    shares = form.share_prompts
    prompts = [form.slot(len(rows[numbers[0]].prompt.token_ids) - 1) * shares for numbers in groups]
    answers = [{number: form.slot(_own_tokens(rows[number], form)) for number in numbers} for numbers in groups]
    microbatches = plan_pairs(prompts, answers, budget=budget, rounds_of=rounds_of, ranks=ranks)
    return [
        tuple(
            number for part in parts for number in sorted(part.rollouts, key=lambda number: answers[part.group][number])
        )
        for parts in microbatches
    ]


def _own_tokens(row: ExperienceRow, form: BatchFormat) -> int:
    """Tokens of a row beside a shared prompt's, the last of which begins every answer's sequence."""
    return len(row.rollout.token_ids) + (1 if form.share_prompts else len(row.prompt.token_ids))


def update_figures(update: PolicyUpdate) -> dict[str, float | None]:
    """What ratios, bounds and divergences came to in a step, as shares of the kept tokens of all its updates.

    None where no token was learned from; gradient norms are the mean and the largest over the updates.
    """
    tokens = sum(one.kept_tokens for one in update.updates)
    norms = [one.result.grad_norm for one in update.updates]
    names = {
        "ratio/mean": "ratio/sum",
        "ratio/kl": "ratio/kl",
        "clip/low_share": "clip/low",
        "clip/high_share": "clip/high",
        "clip/dual_share": "clip/dual",
        "kl/reference": "kl/reference",
    }
    figures: dict[str, float | None] = {
        name: update.sums[key] / tokens if tokens else None for name, key in names.items() if key in update.sums
    }
    if "ratio/max" in update.sums:
        figures["ratio/max"] = update.sums["ratio/max"] if tokens else None
    figures["policy_updates"] = len(norms)
    figures["policy_grad_norm/mean"] = sum(norms) / len(norms) if norms else None
    figures["policy_grad_norm/max"] = max(norms) if norms else None
    return figures
