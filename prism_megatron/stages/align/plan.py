"""Who plays an alignment, on what, and what stays fixed from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.data.identity import Identity
from prism_megatron.data.loader import ExampleSource
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.game.judge import JudgePlan
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.rollout.base import RolloutEngine
from prism_megatron.sampling.exam import Exam
from prism_megatron.sampling.handover import Handover
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.training.policy_update import UpdatePlan


@dataclass(frozen=True, eq=False)
class Players:
    """The two trainable roles, the engine that samples for the policy, its samples, and how it gets new weights.

    ``rewarder`` checks answers to held-out prompts, where any are asked.
    """

    policy: MegatronEngine
    discriminator: MegatronEngine
    rollout: RolloutEngine
    queue: RolloutQueue
    handover: Handover
    rewarder: Rewarder | None = None

    def engines(self) -> dict[str, MegatronEngine]:
        """What a checkpoint holds."""
        return {"policy": self.policy, "discriminator": self.discriminator}

    def close(self) -> None:
        """End what samples and what checks; may be called again."""
        self.queue.close()
        self.rollout.close()
        if self.rewarder is not None:
            self.rewarder.close()


@dataclass(frozen=True, eq=False)
class Prompts:
    """What is asked in the steps, and what no step asks: the probe set's and the exam's, where there are to be any."""

    steps: ExampleSource
    probe: ExampleSource | None = None
    exam: Exam | None = None

    @property
    def identity(self) -> Identity:
        """Which data the run trains on."""
        return self.steps.identity

    @property
    def counts(self) -> Mapping[str, int]:
        """How many of its records are used, and why others are not; nothing for scenes."""
        return {} if self.steps.counts is None else self.steps.counts.to_plain()


@dataclass(frozen=True)
class AlignPlan:
    """What a run keeps fixed from step to step."""

    game: GameConfig
    judging: JudgePlan
    learning: UpdatePlan
    seed: int
    """keys what the game draws: shuffled scores, replayed prompts"""
    steps: int
    logprob_gap_alarm: float = 0.05
    """nats a token between rollout and trainer above which a step says so"""
