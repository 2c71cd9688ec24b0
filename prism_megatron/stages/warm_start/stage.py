"""The discriminator's warm-start: Bradley-Terry on preference pairs, before the game (docs/method.md, section 4).

The policy that answers stays as it is; or pairs are read from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prism_megatron.conversion.checkpoints.folder import ModelFiles, companions_folder
from prism_megatron.data.identity import Identity
from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.evaluation.sample import Sample
from prism_megatron.game.judge import JudgePlan, train
from prism_megatron.run.files import EXPORT
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Artefacts, Outcome, Plain
from prism_megatron.stages.warm_start.gate import Gate, described, measure
from prism_megatron.stages.warm_start.pair_writer import PairWriter, check_new_file
from prism_megatron.stages.warm_start.pairs import Pairs
from prism_megatron.stages.warm_start.rows import WarmStartStep, step_row, what_it_is, why_idle
from prism_megatron.stages.warm_start.view import VIEW
from prism_megatron.training.roles import export_folder


class WarmStart:
    """The stage as the driver plays it (see ``run.stage.Stage``)."""

    name, view, may_go_back = "warm-start", VIEW, False
    title = "Warm-start of a discriminator"

    def __init__(self, discriminator: MegatronEngine, plan: JudgePlan, pairs: Pairs, gate: Gate, session: Session, *,
                 renderer: Renderer, models: Mapping[str, ModelFiles], total_steps: int, identity: Identity,
                 data_counts: Mapping[str, int], write_pairs: Path | None = None) -> None:  # fmt: skip
        """``write_pairs`` is the file that the sampled pairs go to as well."""
        self.discriminator, self.plan, self.pairs, self.gate = discriminator, plan, pairs, gate
        self.renderer, self.session, self.models, self.total_steps = renderer, session, models, total_steps
        self.write_pairs, self.identity, self.data_counts = write_pairs, identity, data_counts
        self.writer: PairWriter | None = None
        self.last: WarmStartStep | None = None

    def engines(self) -> Mapping[str, MegatronEngine]:
        return {"discriminator": self.discriminator}

    def prepare(self, first_step: int) -> None:
        self.pairs.prepare()
        if self.write_pairs is not None and first_step < self.total_steps:
            check_new_file(self.write_pairs)
            if self.session.world.is_main:
                self.writer = PairWriter(self.write_pairs, self.renderer, fresh=first_step == 0)

    def play(self, step: int) -> Outcome:
        """Take the step's pairs and learn from them."""
        with self.session.timers.phase("pairs"):
            pairs = self.pairs.take(step)
        with self.session.timers.phase("discriminator"):
            judgement = train(self.discriminator, pairs.groups, self.plan, world=self.session.world, step=step)
        self.last = WarmStartStep(step, pairs, judgement)
        row = step_row(self.last, self.renderer)
        if self.writer is not None:
            row["written_pairs"] = self.writer.write(step, pairs.examples, pairs.groups)
        idle = why_idle(judgement, pairs, self.renderer)
        return Outcome(row, learned=() if idle else ("discriminator",), idle=idle)

    def samples(self) -> list[Sample]:
        return [] if self.last is None else self.last.samples(self.renderer)

    def finish(self, output: Path) -> Artefacts:
        """Measure on held-out pairs and export, whether the gate is passed or not."""
        session, figures, problem = self.session, None, None
        if self.writer is not None:
            self.writer.close(self.total_steps)
        with session.phase("held_out"):
            held_out = self.pairs.held_out(self.gate.prompts)
            if held_out is not None:
                session.say("scoring held-out pairs")
                figures = measure(self.discriminator, held_out, self.plan, self.renderer, world=session.world)
                problem = self.gate.problem(figures)
                session.say(f"held out: {described(figures)}")
        self.close()
        what = what_it_is(self.discriminator)
        with session.phase("export", f"exporting the {what} to {output / EXPORT}"):
            like = companions_folder(session.checkpoints.newest, "discriminator")
            export_folder(self.discriminator, output / EXPORT, like=like, world=session.world)
        return Artefacts(output / EXPORT, what, {"held_out": figures}, problem)

    def state(self) -> Plain:
        """Nothing: pairs and dropout are keyed by the step."""
        return {}

    def restore(self, state: Plain) -> None:
        """The inverse of :meth:`state`."""

    def finished(self) -> str | None:
        return None

    def close(self) -> None:
        self.pairs.close()
