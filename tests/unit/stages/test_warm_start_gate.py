"""The gate on held-out figures (blind spot: whether its figures predict a good game)."""

from __future__ import annotations

import re

from prism_megatron.evaluation.health import Figures
from prism_megatron.stages.warm_start.gate import Gate, measure
from prism_megatron.stages.warm_start.pairs import StepPairs
from prism_megatron.types import PreferenceGroup
from tests.mini_players import judge_plan
from tests.unit.game.mini_judge import answer, mini_judge, scenes


def figures(*, auc: tuple[float | None, float | None], accuracy: tuple[float | None, float | None]) -> Figures:
    held_out: Figures = {}
    for name, own_auc, own_accuracy in zip(("perception", "reasoning"), auc, accuracy, strict=True):
        held_out |= {f"{name}/auc": own_auc, f"{name}/auc_pairs": 0 if own_auc is None else 9}
        held_out |= {f"{name}/accuracy": own_accuracy, f"{name}/pairs": 0 if own_accuracy is None else 9}
    return held_out


def test_every_tower_with_a_figure_must_reach_it() -> None:
    good = figures(auc=(0.9, 0.8), accuracy=(0.7, 0.6))
    assert Gate(0.8, 0.6, 9).problem(good) is None
    assert re.search(
        r"held-out reasoning below --min-auc 0\.81 .*AUC 0\.800 of 9", Gate(0.81, 0.0, 9).problem(good) or ""
    )
    assert re.search(
        r"held-out perception and reasoning below --min-accuracy 0\.75", Gate(0.0, 0.75, 9).problem(good) or ""
    )


def test_a_tower_without_a_figure_is_passed_over_but_not_both() -> None:
    """Claim: captions of records have no known truth, and a set without solutions judges no reasoning."""
    assert Gate(0.8, 0.6, 9).problem(figures(auc=(None, 0.9), accuracy=(0.7, None))) is None
    nothing = figures(auc=(None, None), accuracy=(0.7, 0.7))
    assert Gate(0.0, 0.6, 9).problem(nothing) is None
    assert re.search(r"give no figure for --min-auc 0\.8 .*leave it out", Gate(0.8, 0.0, 9).problem(nothing) or "")


def test_measuring_held_out_pairs_trains_nothing() -> None:
    """On the mini's discriminator: figures of every pair twice alike, and no byte of weights or moments changed."""
    with mini_judge() as judge:
        examples = scenes(judge.renderer, 3).batch(0)
        groups = [
            PreferenceGroup(one.prompt, one.reference, tuple(answer(one, judge.renderer, r) for r in range(2)))
            for one in examples
        ]
        plan = judge_plan(judge.form, tokens=4096, seed=5, balance=0.005)
        before = judge.digest()
        first, second = (
            measure(judge.engine, StepPairs(examples, groups), plan, judge.renderer, world=judge.world)
            for _ in range(2)
        )
        assert judge.digest() == before
    assert first == second
    assert first["perception/pairs"] == first["reasoning/pairs"] == 6
