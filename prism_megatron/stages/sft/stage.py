"""Stage 1, supervised fine-tuning: cross-entropy on demonstrations, vision tower and projector frozen.

The order of the data is a plan, the same for every layout (``data.stream``); checkpoints say where a run is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.evaluation.sample import Sample
from prism_megatron.run.exports import Exports
from prism_megatron.run.files import EXPORT
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Artefacts, Outcome, Plain
from prism_megatron.stages.sft.plan import Learner, Lessons
from prism_megatron.stages.sft.rows import Best, SFTStep, best_of, shown, step_row, why_idle
from prism_megatron.stages.sft.view import VIEW
from prism_megatron.training.supervised_update import learn, measure


class SFT:
    """The stage as the driver plays it (see ``run.stage.Stage``)."""

    name, view, may_go_back = "sft", VIEW, False

    def __init__(self, learner: Learner, lessons: Lessons, exports: Exports, session: Session) -> None:
        """The policy has its weights."""
        self.learner, self.lessons, self.exports, self.session = learner, lessons, exports, session
        self.identity, self.data_counts = lessons.learned.identity, lessons.learned.counts
        self.models, self.title, self.total_steps = exports.models, exports.title, lessons.steps
        held_out = lessons.held_out
        self.asked = [] if held_out is None else learner.asked(held_out, say=session.say)
        self.sources = () if held_out is None else held_out.sources
        self.digest = "" if held_out is None else str(held_out.identity["digest"])
        self.after: Plain = {}
        self.best: Best | None = None
        self.last: SFTStep | None = None
        self._steps = lessons.learned.steps(self.after)

    def engines(self) -> Mapping[str, MegatronEngine]:
        return {"policy": self.learner.policy}

    def prepare(self, _first_step: int) -> None:
        self.learner.begin()
        if self.lessons.drift is not None:
            self.lessons.drift.begin(self.session)
        self._steps = self.lessons.learned.steps(self.after)

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
        is_best = False
        if self.learner.may_be_best(step, self.total_steps):
            self.best, is_best = best_of(self.best, row, digest=self.digest)
        idle = why_idle(update)
        return Outcome(row, learned=() if idle else ("policy",), idle=idle, best=is_best,
                       lines=[f"left out at its step: {reason}" for reason in rows.skipped])  # fmt: skip

    def finished(self) -> str | None:
        return None

    def state(self) -> Plain:
        best = self.best and asdict(self.best)
        return {"after": dict(self.after), "best": best, "drift": self.lessons.drift and self.lessons.drift.before}

    def restore(self, state: Plain) -> None:
        self.after, self.best = dict(state["after"]), state["best"] and Best(**state["best"])
        if self.lessons.drift is not None:
            self.lessons.drift.before = state["drift"]

    def samples(self) -> list[Sample]:
        return [] if self.last is None else shown(self.last.rows.rows, self.exports.renderer)

    def finish(self, output: Path) -> Artefacts:
        """See how the policy drifted, and export it as it is after the last step."""
        figures = {} if self.lessons.drift is None else {"drift": self.lessons.drift.end(self.session)}
        return self.exports.write(self.learner.policy, output / EXPORT, self.session, figures)

    def close(self) -> None:
        self._steps.close()
        if self.lessons.drift is not None:
            self.lessons.drift.close()
