"""Prompts that no step of a game asks: old answers to them are scored, and new ones of the policy checked.

That is done now and then, and changes neither player.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prism_megatron.data.render import Renderer
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.held_out import line_of, lines_of
from prism_megatron.game.memory import GameMemory
from prism_megatron.game.probe_set import ProbeSet
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Plain
from prism_megatron.stages.align.plan import AlignPlan, Players, Prompts


@dataclass(frozen=True)
class Seen:
    """What held-out prompts said after one step."""

    row: Figures = field(default_factory=dict)
    best: bool = False
    """whether a checkpoint of the step is the best so far"""
    lines: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The probe set, whose answers are the first policy's, and the exam, which every policy answers anew."""

    prompts: Prompts
    players: Players
    plan: AlignPlan
    memory: GameMemory
    """which has the probe set"""

    def begin(self, session: Session) -> None:
        """Sample the probe set and ask the first policy; a run that goes on has done both."""
        source, exam = self.prompts.probe, self.prompts.exam
        if source is not None and self.memory.probe is None:
            with session.phase("probe", "sampling the probe set"):
                self.memory.probe = ProbeSet.draw(source, self.players.queue, step=self.plan.steps)
        if exam is not None and exam.before is None:
            with session.phase("evaluation", f"asking {len(exam.examples)} held-out prompts"):
                exam.begin()

    def look(self, step: int, session: Session, renderer: Renderer, *, ends: bool) -> Seen:
        """Score and ask what is due after ``step``, which may end the run; all ranks together."""
        probe, exam, seen = self.memory.probe, self.prompts.exam, Seen()
        if probe is not None and step % self.plan.game.probe_every == 0:
            with session.timers.phase("probe"):
                players, judging = self.players, self.plan.judging
                seen = Seen(probe.score(players.discriminator, judging, renderer, world=session.world))
        if exam is not None and exam.times.asks_after(step, ends=ends):
            with session.timers.phase("evaluation"):
                sat = exam.sit(step, ends=ends)
            seen = Seen(seen.row | sat.row, sat.best, [line_of(sat.row, step=step)])
        return seen

    def end(self, session: Session) -> Plain:
        """How answers moved since the first policy, which is said, too; nothing where none was asked."""
        if self.prompts.exam is None:
            return {}
        with session.phase("evaluation"):
            found = self.prompts.exam.moved()
        for line in lines_of(found):
            session.say(line)
        return {"held_out": found}

    def to_plain(self) -> Plain | None:
        """What a checkpoint keeps of the exam."""
        return None if self.prompts.exam is None else self.prompts.exam.to_plain()

    def restore(self, plain: Plain | None) -> None:
        """Take back what :meth:`to_plain` gave; None of a run that asked nobody."""
        if self.prompts.exam is not None and plain is not None:
            self.prompts.exam.restore(plain)
