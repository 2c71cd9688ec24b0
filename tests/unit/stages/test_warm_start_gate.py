"""The gate on held-out figures (blind spot: whether its figures predict a good game)."""

from __future__ import annotations

import pytest

from prism_megatron.config.game import GameConfig
from prism_megatron.errors import PrismError
from prism_megatron.evaluation.health import Figures
from prism_megatron.stages.warm_start import StepPairs, WarmStartPlan
from prism_megatron.stages.warm_start_gate import check_gate, measure
from prism_megatron.types import PreferenceGroup
from tests.unit.stages.mini_judge import answer, mini_judge, scenes


def figures(*, auc: tuple[float | None, float | None], accuracy: tuple[float | None, float | None]) -> Figures:
    held_out: Figures = {}
    for name, own_auc, own_accuracy in zip(("perception", "reasoning"), auc, accuracy, strict=True):
        held_out |= {f"{name}/auc": own_auc, f"{name}/auc_pairs": 0 if own_auc is None else 9}
        held_out |= {f"{name}/accuracy": own_accuracy, f"{name}/pairs": 0 if own_accuracy is None else 9}
    return held_out


def test_every_tower_with_a_figure_must_reach_it() -> None:
    good = figures(auc=(0.9, 0.8), accuracy=(0.7, 0.6))
    check_gate(good, min_auc=0.8, min_accuracy=0.6)
    with pytest.raises(PrismError, match=r"held-out reasoning below --min-auc 0\.81 .*AUC 0\.800 of 9"):
        check_gate(good, min_auc=0.81, min_accuracy=0.0)
    with pytest.raises(PrismError, match=r"held-out perception and reasoning below --min-accuracy 0\.75"):
        check_gate(good, min_auc=0.0, min_accuracy=0.75)


def test_a_tower_without_a_figure_is_passed_over_but_not_both() -> None:
    """Claim: captions of records have no known truth, and a set without solutions judges no reasoning."""
    check_gate(figures(auc=(None, 0.9), accuracy=(0.7, None)), min_auc=0.8, min_accuracy=0.6)
    nothing = figures(auc=(None, None), accuracy=(0.7, 0.7))
    check_gate(nothing, min_auc=0.0, min_accuracy=0.6)
    with pytest.raises(PrismError, match=r"give no figure for --min-auc 0\.8 .*leave it out"):
        check_gate(nothing, min_auc=0.8, min_accuracy=0.0)


def test_measuring_held_out_pairs_trains_nothing() -> None:
    """On the mini's discriminator: figures of every pair twice alike, and no byte of weights or moments changed."""
    with mini_judge() as judge:
        examples = scenes(judge.renderer, 3).batch(0)
        groups = [
            PreferenceGroup(one.prompt, one.reference, tuple(answer(one, judge.renderer, r) for r in range(2)))
            for one in examples
        ]
        plan = WarmStartPlan(GameConfig(), judge.form, 4096, load_balance=0.005, seed=5)
        before = judge.digest()
        first, second = (
            measure(judge.engine, StepPairs(examples, groups), plan, judge.renderer, world=judge.world)
            for _ in range(2)
        )
        assert judge.digest() == before
    assert first == second
    assert first["perception/pairs"] == first["reasoning/pairs"] == 6
