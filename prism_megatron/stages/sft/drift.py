"""What fine-tuning moves in the mini world: held-out scenes answered before the first step and after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Plain
from prism_megatron.sampling.handover import Handover
from prism_megatron.sampling.scene_answers import answer_in_all_modes, change, level, tabulate

MAX_ANSWER_TOKENS = 96
"""What an answer about a scene may take; the longest that is right has 55."""

Values = Mapping[str, Mapping[str, Sequence[float]]]
"""Per mode and measure: one value a scene."""


@dataclass(eq=False)
class Drift:
    """A policy's answers to the same scenes, before and after; draws are keyed by ``seed``.

    Example: ``drift.begin(session)``, training, then ``drift.end(session)["greedy"]["caption exact"]["change"]``.
    """

    handover: Handover
    examples: Sequence[Example]
    renderer: Renderer
    seed: int
    before: Values | None = field(default=None, init=False)

    def begin(self, session: Session) -> None:
        """Answer with the weights that are loaded; a run that goes on has its first answers already."""
        if self.before is None:
            with session.phase("drift", f"answering {len(self.examples)} held-out scenes"):
                self.before = self._answered(version=0)

    def end(self, session: Session) -> Plain:
        """How the answers moved, which is said, too.

        Per mode and measure: the mean ``before``, ``after`` and of the paired ``change``, each with its 95 % interval
        (bootstrap over scenes) as ``[mean, low, high]``.
        """
        assert self.before is not None, "begin comes first"
        with session.phase("drift", f"answering the {len(self.examples)} scenes again"):
            after = self._answered(version=1)
        moved = {
            mode: {
                measure: {
                    "before": level(np.array([self.before[mode][measure]])),
                    "after": level(np.array([values])),
                    "change": change(np.array([values]), np.array([self.before[mode][measure]])),
                }
                for measure, values in measures.items()
            }
            for mode, measures in after.items()
        }
        for line in lines_of(moved):
            session.say(line)
        return moved

    def close(self) -> None:
        """Release the replica."""
        self.handover.rollout.close()

    def _answered(self, *, version: int) -> Values:
        self.handover(version, changed_only=False)
        responses = answer_in_all_modes(
            self.handover.rollout,
            self.examples,
            self.renderer,
            max_new_tokens=MAX_ANSWER_TOKENS,
            seed=self.seed,
            world=self.handover.policy.world,
        )
        table = tabulate([responses])
        return {mode: {name: values[0].tolist() for name, values in rows.items()} for mode, rows in table.items()}


def lines_of(moved: Plain) -> list[str]:
    """The means, and the interval of the change, as a table of text."""
    lines = [f"{'':8} {'held-out scenes':<16} {'before':>7} {'after':>7}   change"]
    for mode, measures in moved.items():
        for measure, found in measures.items():
            mean, low, high = found["change"]
            lines.append(
                f"{mode:8} {measure:<16} {found['before'][0]:7.3f} {found['after'][0]:7.3f}   "
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    return lines
