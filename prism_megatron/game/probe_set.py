"""A fixed set of held-out prompts with their first rollouts: what changes in its scores is the discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.data.loader import Example, ExampleSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.game.figures import game_row, rights_of
from prism_megatron.game.judge import judge_and_train
from prism_megatron.game.replay import answers_to_plain, for_judging, group_of
from prism_megatron.rollout.base import RolloutEngine
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.stages.align.stage import AlignPlan, Players
from prism_megatron.types import PreferenceGroup


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """One step's worth of prompts that the game never sees, and the valid answers that the first policy gave them."""

    examples: Sequence[Example]
    groups: Sequence[PreferenceGroup]

    @classmethod
    def draw(
        cls, source: ExampleSource, rollout: RolloutEngine, plan: AlignPlan, *, draw: int, world: World
    ) -> ProbeSet:
        """Sample the answers; all ranks together. ``draw`` is a step number that no step of the run has."""
        examples = source.batch(0)
        groups = sample_groups(
            rollout, examples, plan.sampling, n=plan.rollouts_per_prompt, seed=plan.seed, step=draw, world=world
        )
        return cls(examples, [for_judging(group) for group in groups])

    @classmethod
    def of_plain(cls, plain: Sequence[dict[str, Any]], source: ExampleSource) -> ProbeSet:
        """The inverse of ``to_plain``. Raises CheckpointError as ``group_of``."""
        examples = source.batch(0)[: len(plain)]
        return cls(examples, [group_of(examples, g, kept) for g, kept in enumerate(plain)])

    def to_plain(self) -> list[dict[str, Any]]:
        """The answers as JSON."""
        return [answers_to_plain(group) for group in self.groups]

    def score(self, players: Players, plan: AlignPlan, renderer: Renderer, *, world: World) -> Figures:
        """Figures of both towers as ``game_row`` has them, under ``probe/``; all ranks together, nothing is trained."""
        judgement = judge_and_train(
            players.discriminator,
            self.groups,
            plan.game,
            world=world,
            form=plan.form,
            seed=plan.seed,
            step=0,
            tokens_per_microbatch=plan.tokens_per_microbatch,
            load_balance=0.0,
            updates=0,
        )
        row = game_row(self.groups, judgement, rights_of(self.examples, self.groups, renderer))
        return {f"probe/{name}": value for name, value in row.items()}
