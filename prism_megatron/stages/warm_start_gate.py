"""What a warmed-up discriminator shows on held-out pairs, and whether that is enough to play with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.evaluation.auc import AUC
from prism_megatron.stages.batches import TOWER_NAMES
from prism_megatron.stages.truth import group_auc
from prism_megatron.stages.warm_start import StepPairs, WarmStartPlan, judge_pairs


@dataclass(frozen=True)
class TowerFigures:
    """One tower on the held-out pairs. A share without data is None beside a count of 0."""

    accuracy: float | None
    """share of pairs whose reference scores higher; a tie is one half"""
    pairs: int
    margin: float | None
    """mean of reference score minus answer score"""
    auc: AUC
    """within groups, of right answers above wrong ones"""


HeldOut = Mapping[str, TowerFigures]
"""By the towers' names."""


def measure(
    discriminator: MegatronEngine, held_out: StepPairs, plan: WarmStartPlan, renderer: Renderer, *, world: World
) -> HeldOut:
    """Score the pairs without a gradient, on all ranks together."""
    only_score = replace(plan, game=replace(plan.game, freeze_discriminator=True), load_balance=0.0)
    judgement = judge_pairs(discriminator, held_out.groups, only_score, world=world, step=0)
    auc: Sequence[AUC] = [AUC(None, 0) for _ in TOWER_NAMES]
    if held_out.examples:
        auc = group_auc(held_out.examples, held_out.groups, judgement.scores, renderer)
    figures = {}
    for name, own in zip(TOWER_NAMES, auc, strict=True):
        pairs = judgement.sums[f"{name}/pairs"]
        correct, margin = (judgement.sums[f"{name}/{key}"] for key in ("correct", "margin"))
        figures[name] = TowerFigures(
            accuracy=correct / pairs if pairs else None,
            pairs=int(pairs),
            margin=margin / pairs if pairs else None,
            auc=own,
        )
    return figures


def described(held_out: HeldOut) -> str:
    """One line for people."""
    return ", ".join(
        f"{name}: accuracy {_number(own.accuracy)} of {own.pairs} pairs, "
        f"AUC {_number(own.auc.value)} of {own.auc.pairs}"
        for name, own in held_out.items()
    )


def check_gate(held_out: HeldOut, *, min_auc: float, min_accuracy: float) -> None:
    """Raise PrismError where a tower stays below a minimum above 0, or no tower has the figure at all.

    A tower that judges none of the pairs, or of whose answers nobody knows which are right, is passed over.
    """
    minima = (
        ("--min-auc", min_auc, {name: own.auc.value for name, own in held_out.items()}),
        ("--min-accuracy", min_accuracy, {name: own.accuracy for name, own in held_out.items()}),
    )
    for flag, minimum, values in minima:
        known = {name: value for name, value in values.items() if value is not None}
        if minimum > 0 and not known:
            raise PrismError(
                f"held-out pairs give no figure for {flag} {minimum:g} ({described(held_out)}); leave it out"
            )
        low = {name: value for name, value in known.items() if value < minimum}
        if low:
            raise PrismError(
                f"held-out {' and '.join(low)} below {flag} {minimum:g} ({described(held_out)}): "
                "not a discriminator to align against; train longer, on more pairs, or lower the gate"
            )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
