"""Stage 2, alignment: the policy answers, the discriminator ranks the reference above the answers, each learns.

Every rank holds all groups of a step (docs/method.md, section 7): global denominators need no collective. Rollouts
drawn ahead make a step off-policy by what is reported, and not corrected for.
"""

from __future__ import annotations

from pathlib import Path

from prism_megatron.evaluation.sample import Sample
from prism_megatron.game.credit import credit_groups, experience_of
from prism_megatron.game.judge import train
from prism_megatron.game.memory import GameMemory
from prism_megatron.run.exports import Exports
from prism_megatron.run.files import EXPORT
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Artefacts, Outcome, Plain
from prism_megatron.stages.align.held_out import HeldOut
from prism_megatron.stages.align.plan import AlignPlan, Players, Prompts
from prism_megatron.stages.align.rows import AlignStep, observation_of, outcome_of
from prism_megatron.stages.align.view import VIEW
from prism_megatron.training.policy_update import measure_policy, update_policy


class Alignment:
    """The stage as the driver plays it (see ``run.stage.Stage``)."""

    name, view = "align", VIEW

    def __init__(self, players: Players, plan: AlignPlan, prompts: Prompts, exports: Exports, session: Session) -> None:
        """The players have their weights, the rollout engine has none yet."""
        self.players, self.plan, self.prompts, self.exports, self.session = players, plan, prompts, exports, session
        self.engines, self.close, self.models = players.engines, players.close, exports.models
        self.title, self.identity, self.data_counts = exports.title, prompts.identity, prompts.counts
        self.total_steps, self.may_go_back = plan.steps, plan.game.rollbacks > 0
        self.memory = GameMemory.fresh(plan.game, seed=plan.seed)
        self.held_out = HeldOut(prompts, players, plan, self.memory)
        self.last: AlignStep | None = None

    def prepare(self, first_step: int) -> None:
        """Hand the weights over, and see how held-out prompts are answered before anybody learns."""
        with self.session.phase("weight_sync", "handing the policy's weights to the rollout engine"):
            self.players.handover(first_step, changed_only=False)
        self.held_out.begin(self.session)

    def play(self, step: int) -> Outcome:
        """One round. Raises GameError as ``Controls.observe``."""
        players, plan, memory, controls = self.players, self.plan, self.memory, self.memory.controls
        world, phase, renderer = self.session.world, self.session.timers.phase, self.exports.renderer
        decision = controls.decide(step)
        # The policy answers; engines that sample on the trainer's devices then make room for the players.
        with phase("rollout"):
            sampled = players.queue.take(step)
            players.rollout.sleep()
        groups, replayed = sampled.groups, memory.replay.draw(step)
        # The discriminator scores the answers, then learns to tell them from the references.
        with phase("discriminator"):
            judgement = train(players.discriminator, groups, plan.judging, world=world, step=step,
                              updates=decision.discriminator_updates, replayed=replayed)  # fmt: skip
        credited = credit_groups(groups, judgement, plan.game, seed=plan.seed, step=step,
                                 version=controls.state.discriminator_version)  # fmt: skip
        # The policy learns to please it.
        experience = experience_of(groups, credited, plan.game, version=sampled.version)
        learns = decision.update_policy and judgement.finite and experience.rewarded
        with phase("policy"):
            learn = update_policy if learns else measure_policy
            update = learn(players.policy, experience, plan.learning, world=world)
        verdict = controls.observe(step, observation_of(groups, judgement, update.result))
        # Both players may have to go back; whoever samples gets what there is now.
        if verdict == "roll back":
            self.session.go_back(players.engines())
            players.queue.begin_again()
        if verdict == "roll back" or update.updated:
            with phase("weight_sync"):
                players.handover(step + 1)
        players.handover.wake()
        memory.replay.add(step, groups)
        self.last = AlignStep(step, sampled, replayed, decision, judgement, credited, update, verdict)
        # Now and then both are looked at on prompts that they never learn from.
        seen = self.held_out.look(step, self.session, renderer, ends=verdict == "stop")
        return outcome_of(self.last, seen, plan, renderer, good=controls.state.weak_steps == 0)

    def finished(self) -> str | None:
        return "the reward gaps have settled: no step is left" if self.memory.controls.finished else None

    def state(self) -> Plain:
        return {**self.memory.to_plain(), "exam": self.held_out.to_plain()}

    def restore(self, state: Plain) -> None:
        self.memory.restore(state, self.prompts.steps.batch, self.prompts.probe)
        self.held_out.restore(state.get("exam"))

    def samples(self) -> list[Sample]:
        return [] if self.last is None else self.last.samples(self.exports.renderer)

    def finish(self, output: Path) -> Artefacts:
        figures = self.held_out.end(self.session)
        self.close()
        return self.exports.write(self.players.policy, output / EXPORT, self.session, figures)
