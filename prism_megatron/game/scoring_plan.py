"""Which sequences the discriminator reads together in a step, and what that costs.

Every rollout is compared with its group's reference, tower by tower. Two plans are made, and the one is taken that is
done first where data-parallel ranks wait for each other:

*beside*: every micro-batch has a copy of the references that its rollouts are compared with, and one pass does it all;
*apart*: references have micro-batches of their own. They are scored first, without gradients; rollouts then learn
against these numbers, and add up what the loss's slope in each of them is; last, the references are run again with
these slopes for a loss. By the chain rule the gradient is the same (gradient caching: Gao et al., 2101.06983, here of
the references alone), and no reference is copied, at the price of one more forward pass over the references.

Both are a pure function of lengths, so that every rank makes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prism_megatron.game.judged_rows import ScoreMicroBatch, ScorePart, prompt_slots, segment_slots
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.microbatches import GroupPart, of_rank, plan_pairs
from prism_megatron.types import PreferenceGroup

FORWARD, BACKWARD = 1, 2
"""What a pass over a token costs: the backward one makes two products of each of the forward one's."""


@dataclass(frozen=True)
class TrunkCost:
    """What a step's pass runs through the trunk, over all data-parallel ranks."""

    trunk_tokens: int
    """token slots that run forward: padding, and what is read more than once, included"""
    unique_tokens: int
    """the same without padding and repetition, a prompt once for each tower: what has to be run"""
    passes: int
    """passes over a token slot: 1 for each forward, 2 for each backward"""
    references: int
    """references that rollouts learn from, copies included, over both towers"""
    rollouts: int
    """rollouts over both towers"""
    learns: bool = True
    """whether there is a backward pass"""
    apart: bool = False
    """whether references have micro-batches of their own"""

    @property
    def overhead(self) -> float:
        """Passes over those that running every unique token once would take; 1 is the least there can be."""
        return self.passes / (self.unique_tokens * (FORWARD + BACKWARD * self.learns))


@dataclass(frozen=True)
class ScoringPlan:
    """Micro-batches of all data-parallel ranks."""

    pairs: Sequence[ScoreMicroBatch]
    """rollouts; where no ``references`` are apart, beside theirs"""
    references: Sequence[ScoreMicroBatch]
    cost: TrunkCost
    busiest: int
    """passes over token slots of the ranks that the others wait for, added up from wait to wait"""


def plan_scoring(
    groups: Sequence[PreferenceGroup],
    form: BatchFormat,
    *,
    tokens_per_microbatch: int,
    rounds_of: int,
    ranks: int = 1,
    learns: bool = True,
) -> ScoringPlan:
    """The plan whose busiest ranks have least to do, of two alike the one of fewer passes, and else ``beside``."""
    slots = _Slots.of(groups, form)
    ways = WAYS if any(slots.rollouts) else (beside,)
    plans = [way(slots, tokens_per_microbatch, rounds_of, ranks, learns=learns) for way in ways]
    return min(plans, key=lambda plan: (plan.busiest, plan.cost.passes))


@dataclass(frozen=True)
class _Slots:
    """Token slots of what there is to judge: one entry for each group and tower."""

    units: Sequence[tuple[int, int]]
    prompts: Sequence[int]
    """of a shared prompt; 0 where every sequence has its own"""
    references: Sequence[int]
    rollouts: Sequence[dict[int, int]]
    unique_tokens: int

    @classmethod
    def of(cls, groups: Sequence[PreferenceGroup], form: BatchFormat) -> _Slots:
        units = [(g, tower) for g, group in enumerate(groups) for tower in group.towers]
        prompts, references, rollouts, unique = [], [], [], 0
        bare = replace(form, length_multiple=1, share_prompts=True)
        for g, tower in units:
            group = groups[g]
            valid = {r: group.rollouts[r] for r in group.valid_rollouts}
            prompts.append(prompt_slots(group, form))
            references.append(segment_slots(group, group.reference, tower, form))
            rollouts.append({r: segment_slots(group, answer, tower, form) for r, answer in valid.items()})
            unique += prompt_slots(group, bare)
            unique += sum(segment_slots(group, answer, tower, bare) for answer in (group.reference, *valid.values()))
        return cls(units, prompts, references, rollouts, unique)

    def tokens(self, plan: Sequence[ScoreMicroBatch]) -> int:
        """Slots of all micro-batches of a plan."""
        unit_of = {unit: number for number, unit in enumerate(self.units)}
        total = 0
        for part in (part for parts in plan for part in parts):
            unit = unit_of[part.group, part.tower]
            total += self.prompts[unit]
            total += sum(self.references[unit] if r is None else self.rollouts[unit][r] for r in part.answers)
        return total

    def of_busiest(self, plan: Sequence[ScoreMicroBatch], ranks: int) -> int:
        """Slots of the rank that has most."""
        return max(self.tokens(of_rank(plan, dp_rank=rank, dp_size=ranks)) for rank in range(ranks))

    def cost(self, tokens: int, passes: int, *, references: int, learns: bool, apart: bool) -> TrunkCost:
        return TrunkCost(
            tokens, self.unique_tokens, passes, references, sum(map(len, self.rollouts)), learns=learns, apart=apart
        )


def beside(slots: _Slots, budget: int, rounds_of: int, ranks: int, *, learns: bool) -> ScoringPlan:
    """Every micro-batch has the references of its rollouts."""
    references = [prompt + own for prompt, own in zip(slots.prompts, slots.references, strict=True)]
    plan = [
        tuple(_part(slots.units, part, None, *part.rollouts) for part in parts)
        for parts in plan_pairs(references, slots.rollouts, budget=budget, rounds_of=rounds_of, ranks=ranks)
    ]
    tokens = slots.tokens(plan)
    once = FORWARD + BACKWARD * learns
    copies = sum(len(parts) for parts in plan)
    cost = slots.cost(tokens, tokens * once, references=copies, learns=learns, apart=False)
    return ScoringPlan(plan, (), cost, slots.of_busiest(plan, ranks) * once)


def apart(slots: _Slots, budget: int, rounds_of: int, ranks: int, *, learns: bool) -> ScoringPlan:
    """References have micro-batches of their own.

    A micro-batch of rollouts that only makes up the number has a reference that counts nowhere.
    """
    having = [unit for unit, rollouts in enumerate(slots.rollouts) if rollouts]
    units = [slots.units[unit] for unit in having]
    planned = plan_pairs(
        [slots.prompts[unit] for unit in having],
        [slots.rollouts[unit] for unit in having],
        budget=budget,
        rounds_of=rounds_of,
        ranks=ranks,
    )
    pairs = [
        tuple(
            _part(units, part, *part.rollouts) if part.rollouts else _part(units, replace(part, repeated=True), None)
            for part in parts
        )
        for parts in planned
    ]
    whole = [prompt + own for prompt, own in zip(slots.prompts, slots.references, strict=True)]
    references = [
        tuple(_part(slots.units, part, None) for part in parts)
        for parts in plan_pairs(whole, [{} for _ in whole], budget=budget, rounds_of=rounds_of, ranks=ranks)
    ]

    def passes(of_pairs: int, of_references: int) -> int:
        return of_pairs * (FORWARD + BACKWARD * learns) + of_references * (FORWARD + (FORWARD + BACKWARD) * learns)

    of_pairs, of_references = slots.tokens(pairs), slots.tokens(references)
    cost = slots.cost(
        of_pairs + of_references * (1 + learns),
        passes(of_pairs, of_references),
        references=len(whole),
        learns=learns,
        apart=True,
    )
    waited_for = passes(slots.of_busiest(pairs, ranks), slots.of_busiest(references, ranks))
    return ScoringPlan(pairs, references, cost, waited_for)


WAYS = (beside, apart)


def _part(units: Sequence[tuple[int, int]], part: GroupPart, *answers: int | None) -> ScorePart:
    group, tower = units[part.group]
    return ScorePart(group, tower, answers, repeated=part.repeated)
