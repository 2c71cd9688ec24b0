"""Stage 1, supervised fine-tuning: cross-entropy on demonstrations, vision tower and projector frozen.

The order of the data is a plan, the same for every layout (``data.stream``); checkpoints say where a run is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prism_megatron.conversion.checkpoint_folder import ModelFiles, companions_folder
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.evaluation.sample import Sample
from prism_megatron.run.files import EXPORT
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Artefacts, Outcome, Plain
from prism_megatron.stages.sft.demonstrations import Demonstrations
from prism_megatron.stages.sft.plan import Learner
from prism_megatron.stages.sft.rows import SFTStep, best_of, shown, step_row, what_it_is, why_idle
from prism_megatron.stages.sft.view import VIEW
from prism_megatron.training.roles import export_folder
from prism_megatron.training.supervised_update import learn, measure


class SFT:
    """The stage as the driver plays it (see ``run.stage.Stage``)."""

    name, view, may_go_back = "sft", VIEW, False

    def __init__(
        self,
        learner: Learner,
        demonstrations: Demonstrations,
        held_out: Demonstrations | None,
        session: Session,
        *,
        models: Mapping[str, ModelFiles],
        title: str,
        total_steps: int,
    ) -> None:
        self.learner, self.demonstrations, self.session = learner, demonstrations, session
        self.models, self.title, self.total_steps = models, title, total_steps
        self.identity, self.data_counts = demonstrations.identity, demonstrations.counts
        self.asked = [] if held_out is None else learner.asked(held_out)
        self.sources = () if held_out is None else held_out.sources
        self.after: Plain = {}
        self.best: float | None = None
        self.last: SFTStep | None = None
        self._steps = demonstrations.steps(self.after)

    def engines(self) -> Mapping[str, MegatronEngine]:
        return {"policy": self.learner.policy}

    def prepare(self, _first_step: int) -> None:
        self.learner.begin()
        self._steps = self.demonstrations.steps(self.after)

    def play(self, step: int) -> Outcome:
        """Take the step's rows, learn from them, and now and then ask what was held out."""
        world, phase, policy = self.session.world, self.session.timers.phase, self.learner.policy
        with self.learner.step():
            with phase("data"):
                rows = next(self._steps)
                batches = self.learner.batches(rows.rows)
            with phase("policy"):
                update = learn(policy, batches, world=world)
        self.after, held_out = rows.after, None
        if self.asked and self.learner.asks_after(step, self.total_steps):
            with phase("held_out"):
                held_out = measure(policy, self.asked, self.sources, world=world)
        self.last = SFTStep(step, rows, update, held_out)
        row = step_row(self.last, learner=self.learner, world=world)
        self.best, is_best = best_of(self.best, row)
        idle = why_idle(update)
        return Outcome(row, learned=() if idle else ("policy",), idle=idle, good=is_best,
                       lines=[f"left out at its step: {reason}" for reason in rows.skipped])  # fmt: skip

    def finished(self) -> str | None:
        return None

    def state(self) -> Plain:
        return {"after": dict(self.after), "best": self.best}

    def restore(self, state: Plain) -> None:
        self.after, self.best = dict(state["after"]), state["best"]

    def samples(self) -> list[Sample]:
        return [] if self.last is None else shown(self.last.rows.rows, self.learner.renderer)

    def finish(self, output: Path) -> Artefacts:
        """Export the policy as it is after the last step."""
        policy, what = self.learner.policy, what_it_is(self.learner.policy)
        with self.session.phase("export", f"exporting the {what} to {output / EXPORT}"):
            like = companions_folder(self.session.checkpoints.newest, "policy")
            export_folder(policy, output / EXPORT, like=like, world=self.session.world)
        return Artefacts(output / EXPORT, what)

    def close(self) -> None:
        self.learner.end()
        self._steps.close()
