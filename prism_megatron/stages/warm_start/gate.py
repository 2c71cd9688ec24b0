"""What a warmed-up discriminator shows on held-out pairs, and whether that is enough to play with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.game.figures import game_row
from prism_megatron.game.judge import JudgePlan, score
from prism_megatron.stages.warm_start.pairs import StepPairs
from prism_megatron.types import TOWER_NAMES


@dataclass(frozen=True)
class Gate:
    """What a discriminator has to show; a minimum of 0 asks for nothing."""

    min_auc: float
    min_accuracy: float
    prompts: int
    """held-out prompts to measure both on"""

    def problem(self, held_out: Figures) -> str | None:
        """Where a tower stays below a minimum above 0, or no tower has the figure at all; None if it passes.

        A tower that judges none of the pairs, or of whose answers nobody knows which are right, is passed over.
        """
        for figure, minimum in (("auc", self.min_auc), ("accuracy", self.min_accuracy)):
            values = {name: held_out[f"{name}/{figure}"] for name in TOWER_NAMES}
            known = {name: value for name, value in values.items() if value is not None}
            asked = f"--min-{figure} {minimum:g}"
            if minimum > 0 and not known:
                return f"held-out pairs give no figure for {asked} ({described(held_out)}); leave it out"
            if low := [name for name, value in known.items() if value < minimum]:
                return (
                    f"held-out {' and '.join(low)} below {asked} ({described(held_out)}): not a discriminator to align "
                    "against; train longer, on more pairs, or lower the gate"
                )
        return None


def measure(
    discriminator: MegatronEngine, held_out: StepPairs, plan: JudgePlan, renderer: Renderer, *, world: World
) -> Figures:
    """Both towers' figures on the pairs, as ``game_row`` has them; nothing is trained. On all ranks together."""
    judgement = score(discriminator, held_out.groups, replace(plan, load_balance=0.0), world=world, step=0)
    return game_row(held_out.groups, judgement, held_out.rights(renderer))


def described(held_out: Figures) -> str:
    """One line for people."""
    return ", ".join(
        f"{name}: accuracy {_number(held_out[f'{name}/accuracy'])} of {held_out[f'{name}/pairs']} pairs, "
        f"AUC {_number(held_out[f'{name}/auc'])} of {held_out[f'{name}/auc_pairs']}"
        for name in TOWER_NAMES
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
