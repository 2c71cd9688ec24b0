"""The discriminator's warm-start: Bradley-Terry on preference pairs, before the game (method notes, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_megatron.config.game import GameConfig
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.game.figures import Rights, rights_of
from prism_megatron.game.judge import Judgement, judge_and_train
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.training.batches import BatchFormat
from prism_megatron.types import PreferenceGroup


@dataclass(frozen=True)
class StepPairs:
    """One step's pairs: a group's reference against each of its valid answers.

    ``examples`` are those that the groups were sampled for, one each; there are none for pairs read from a file.
    """

    examples: Sequence[Example]
    groups: Sequence[PreferenceGroup]

    def rights(self, renderer: Renderer) -> Rights:
        """Which answers are known to be right."""
        return rights_of(self.examples, self.groups, renderer) if self.examples else [None] * len(self.groups)


@dataclass(frozen=True)
class WarmStartPlan:
    """What a warm-start keeps fixed from step to step. ``load_balance`` is per layer and tower."""

    game: GameConfig
    form: BatchFormat
    tokens_per_microbatch: int
    load_balance: float
    seed: int


@dataclass(frozen=True)
class WarmStartStep:
    """Everything one step produced; observers read it and change nothing."""

    step: int
    pairs: StepPairs
    judgement: Judgement


def warm_start(
    discriminator: MegatronEngine,
    pairs: Callable[[int], StepPairs],
    plan: WarmStartPlan,
    *,
    world: World,
    steps: range,
    timers: PhaseTimers,
    on_step: Callable[[WarmStartStep], None],
) -> None:
    """Take ``steps``; ``pairs(step)`` gives the same pairs on every rank, sampled or read. ``on_step`` on all ranks."""
    for step in steps:
        with timers.phase("pairs"):
            taken = pairs(step)
        with timers.phase("discriminator"):
            judgement = judge_pairs(discriminator, taken.groups, plan, world=world, step=step)
        on_step(WarmStartStep(step, taken, judgement))


def judge_pairs(
    discriminator: MegatronEngine, groups: Sequence[PreferenceGroup], plan: WarmStartPlan, *, world: World, step: int
) -> Judgement:
    """One step on the pairs; with ``plan.game.freeze_discriminator`` they are only scored."""
    return judge_and_train(
        discriminator,
        groups,
        plan.game,
        world=world,
        form=plan.form,
        seed=plan.seed,
        step=step,
        tokens_per_microbatch=plan.tokens_per_microbatch,
        load_balance=plan.load_balance,
    )
