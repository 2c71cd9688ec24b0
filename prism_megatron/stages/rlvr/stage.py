"""Stage 3, reinforcement learning from verifiable rewards: the policy answers, answers are checked, right ones gain.

Every rank holds all groups of a step, so that global denominators need no collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.evaluation.held_out import lines_of
from prism_megatron.evaluation.sample import Sample
from prism_megatron.run.exports import Exports
from prism_megatron.run.files import EXPORT
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Artefacts, Outcome, Plain
from prism_megatron.sampling.exam import NOT_ASKED
from prism_megatron.stages.rlvr.plan import Learner, Prompts, RLVRPlan
from prism_megatron.stages.rlvr.rows import RLVRStep, outcome_of, shown
from prism_megatron.stages.rlvr.view import VIEW


class RLVR:
    """The stage as the driver plays it (see ``run.stage.Stage``)."""

    name, view, may_go_back = "rlvr", VIEW, False

    def __init__(self, learner: Learner, plan: RLVRPlan, prompts: Prompts, exports: Exports, session: Session) -> None:
        """The policy has its weights, the rollout engine has none yet."""
        self.learner, self.plan, self.exam, self.exports, self.session = learner, plan, prompts.exam, exports, session
        self.identity, self.data_counts = prompts.steps.identity, prompts.counts
        self.models, self.title, self.total_steps = exports.models, exports.title, plan.steps
        self.close = learner.close
        self.last: RLVRStep | None = None

    def engines(self) -> Mapping[str, MegatronEngine]:
        return {"policy": self.learner.policy}

    def prepare(self, first_step: int) -> None:
        """Hand the weights over, and see how the policy answers before it learns anything."""
        with self.session.phase("weight_sync", "handing the policy's weights to the rollout engine"):
            self.learner.handover(first_step, changed_only=False)
        if self.exam is not None:
            with self.session.phase("evaluation", f"{len(self.exam.examples)} held-out prompts"):
                self.exam.begin()

    def play(self, step: int) -> Outcome:
        """Answer prompts, check the answers, learn from those that differ."""
        learner, plan, phase = self.learner, self.plan, self.session.timers.phase
        # Prompts are answered, and answers checked, until enough groups have something to teach.
        with phase("rollout"):
            found = learner.prospector.find()
            learner.rollout.sleep()
        # A right answer gains by how much it is above its group.
        experience, rewards = plan.crediting.experience(found.groups, version=found.version)
        learning = plan.learning_from(len(found.groups))
        update = learner.learn(experience, learning, self.session) if experience.rewarded else None
        # Whoever samples gets the weights that there are now.
        if update is not None and update.updated:
            with phase("weight_sync"):
                learner.handover(step + 1)
        learner.handover.wake()
        # Now and then it is asked what it never learns from.
        held_out = NOT_ASKED
        if self.exam is not None and self.exam.times.asks_after(step):
            with phase("evaluation"):
                held_out = self.exam.sit(step)
        self.last = RLVRStep(step, found, rewards, update, held_out)
        return outcome_of(self.last, plan)

    def finished(self) -> str | None:
        return None

    def state(self) -> Plain:
        return {"cursor": self.learner.prospector.cursor, **({} if self.exam is None else self.exam.to_plain())}

    def restore(self, state: Plain) -> None:
        self.learner.prospector.cursor = state["cursor"]
        if self.exam is not None:
            self.exam.restore(state)

    def samples(self) -> list[Sample]:
        return [] if self.last is None else shown(self.last.found, self.exports.renderer)

    def finish(self, output: Path) -> Artefacts:
        """Say how held-out prompts are answered now, and export the policy."""
        figures: Plain = {}
        if self.exam is not None:
            figures = {"held_out": self.exam.moved()}
            for line in lines_of(figures["held_out"]):
                self.session.say(line)
        self.close()
        return self.exports.write(self.learner.policy, output / EXPORT, self.session, figures)
