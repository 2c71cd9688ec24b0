"""A fixed set of held-out prompts with their first rollouts: what changes in its scores is the discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prism_megatron.data.loader import Example, ExampleSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.game.figures import game_row, rights_of
from prism_megatron.game.judge import JudgePlan, score
from prism_megatron.game.replay import answers_to_plain, for_judging, group_of
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.types import PreferenceGroup


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """One step's worth of prompts that the game never sees, and the valid answers that the first policy gave them."""

    examples: Sequence[Example]
    groups: Sequence[PreferenceGroup]

    @classmethod
    def draw(cls, source: ExampleSource, queue: RolloutQueue, *, step: int) -> ProbeSet:
        """Sample the answers; all ranks together. ``step`` keys the draws: one that no step of the run has."""
        examples = source.batch(0)
        return cls(examples, [for_judging(group) for group in queue.sample(examples, step=step)])

    @classmethod
    def of_plain(cls, plain: Sequence[dict[str, Any]], source: ExampleSource) -> ProbeSet:
        """The inverse of ``to_plain``. Raises CheckpointError as ``group_of``."""
        examples = source.batch(0)[: len(plain)]
        return cls(examples, [group_of(examples, g, kept) for g, kept in enumerate(plain)])

    def to_plain(self) -> list[dict[str, Any]]:
        """The answers as JSON."""
        return [answers_to_plain(group) for group in self.groups]

    def score(self, discriminator: MegatronEngine, plan: JudgePlan, renderer: Renderer, *, world: World) -> Figures:
        """Figures of both towers as ``game_row`` has them, under ``probe/``; all ranks together, nothing is trained."""
        judgement = score(discriminator, self.groups, replace(plan, load_balance=0.0), world=world, step=0)
        row = game_row(self.groups, judgement, rights_of(self.examples, self.groups, renderer))
        return {f"probe/{name}": value for name, value in row.items()}
