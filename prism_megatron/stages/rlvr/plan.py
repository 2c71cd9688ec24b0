"""Who learns in reinforcement learning from verifiable rewards, and what stays fixed from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from prism_megatron.data.loader import ExampleSource
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.rollout.base import RolloutEngine
from prism_megatron.run.session import Session
from prism_megatron.sampling.exam import Exam
from prism_megatron.sampling.handover import Handover
from prism_megatron.stages.rlvr.credit import Crediting
from prism_megatron.stages.rlvr.prospect import Prospector
from prism_megatron.training.experience import Experience
from prism_megatron.training.policy_update import PolicyUpdate, UpdatePlan, beside_reference, update_policy


@dataclass(frozen=True, eq=False)
class Learner:
    """The policy, who samples for it and rewards what it says, and how it gets new weights."""

    policy: MegatronEngine
    reference: MegatronEngine | None
    """the policy as it came, which it is held near to; None for no divergence in the loss"""
    rollout: RolloutEngine
    prospector: Prospector
    rewarder: Rewarder
    handover: Handover

    def learn(self, experience: Experience, plan: UpdatePlan, session: Session) -> PolicyUpdate:
        """Update the policy; where it is held near to a reference, that one's log-probs are found first."""
        world, phase = session.world, session.timers.phase
        if self.reference is not None:
            with phase("reference"):
                experience = beside_reference(self.reference, experience, plan, world=world)
        with phase("policy"):
            return update_policy(self.policy, experience, plan, world=world)

    def close(self) -> None:
        """End what samples and what rewards; may be called again."""
        self.prospector.queue.close()
        self.rollout.close()
        self.rewarder.close()


@dataclass(frozen=True, eq=False)
class Prompts:
    """What is asked in the steps, and what no step asks, where anything is held out."""

    steps: ExampleSource
    exam: Exam | None

    @property
    def counts(self) -> Mapping[str, int]:
        """How many records are used, and why others are not; nothing for scenes."""
        return {} if self.steps.counts is None else self.steps.counts.to_plain()


@dataclass(frozen=True)
class RLVRPlan:
    """What a run keeps fixed from step to step."""

    crediting: Crediting
    learning: UpdatePlan
    steps: int
    prompts_per_step: int
    """groups that a step wants to learn from"""
    rollouts_per_prompt: int
    logprob_gap_alarm: float

    def learning_from(self, groups: int) -> UpdatePlan:
        """The update on so many groups: where they are fewer than wanted there may be fewer mini-batches."""
        objective = self.learning.objective
        most = max(1, groups * self.rollouts_per_prompt)
        return replace(self.learning, objective=replace(objective, mini_batches=min(objective.mini_batches, most)))
