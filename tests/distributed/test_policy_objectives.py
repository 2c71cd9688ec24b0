"""Objectives of a real model over layouts, against twins in float64; and what tells them apart."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.algorithms import ALGORITHMS
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.testing import GlooWorld
from prism_megatron.training.policy_update import update_figures
from prism_megatron.training.token_logprobs import TokenScores
from tests.distributed.objective_ranks import (
    FEW,
    WHOLE,
    Given,
    four_mini_batches,
    learnt,
    linear,
    scores,
    scores_of_the_mini,
)
from tests.parity.align_ranks import sample
from tests.unit.losses.policy.twins import Found, Row, twin

WIDE = {"gspo": 0.05, "gspo-token": 0.05, "gmpo": 0.15}
"""Bounds that ratios of these answers meet on both sides."""
OBJECTIVES: dict[str, PolicyObjective] = {
    name: replace(
        preset.objective,
        clip_low=WIDE.get(preset.objective.family, preset.objective.clip_low),
        clip_high=WIDE.get(preset.objective.family, preset.objective.clip_high),
        divergence_bound=0.004,
    )
    for name, preset in ALGORITHMS.items()
    if not name.startswith("prism-") or name == "prism-grpo"
}
LAYOUTS: dict[str, tuple[int, ParallelConfig, int]] = {
    "one rank": (1, ParallelConfig(), WHOLE),
    "micro-batches": (1, ParallelConfig(), FEW),
    "DP2": (2, ParallelConfig(), FEW),
    "CP2": (2, ParallelConfig(cp=2), WHOLE),
    "CP2, micro-batches": (2, ParallelConfig(cp=2), FEW),
    "TP2-PP2-CP2": (8, ParallelConfig(tp=2, pp=2, cp=2), FEW),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(8) as world:
        yield world


@pytest.fixture(scope="module")
def alone(gloo: GlooWorld) -> list[TokenScores]:
    found: list[TokenScores] = gloo.run(scores, WHOLE, num_ranks=1)[0]
    return found


@pytest.fixture(scope="module")
def given(alone: Sequence[TokenScores]) -> list[Given]:
    """Ratios about 1 with a spread of 0.4, advantages of answers and of tokens, weights with some tokens left out."""
    draw, rows = random.Random(3), []
    for number, own in enumerate(alone):
        n = len(own.logprobs)
        whole = draw.gauss(0, 1)
        rows.append(
            Given(
                [whole] * n if number % 2 else [draw.gauss(0, 1) for _ in range(n)],
                [lp + draw.gauss(0, 0.4) for lp in own.logprobs],
                [lp + draw.gauss(0, 0.3) for lp in own.logprobs],
                [0.0 if draw.random() < 0.2 else draw.uniform(0.5, 1.5) for _ in range(n)],
            )
        )
    return rows


@pytest.fixture(scope="module")
def expected(gloo: GlooWorld, alone: Sequence[TokenScores], given: Sequence[Given]) -> dict[str, tuple[Found, Tensor]]:
    """The twins' figures, and what their derivatives make of the weights of the model, answer by answer."""
    rows = [
        Row(own.logprobs, one.old, one.advantages, one.weights, one.reference)
        for own, one in zip(alone, given, strict=True)
    ]
    twins = {name: twin(objective, rows) for name, objective in OBJECTIVES.items()}
    gradients: Mapping[str, Tensor] = gloo.run(
        linear, {name: found.gradient for name, found in twins.items()}, num_ranks=1
    )[0]
    return {name: (found, gradients[name]) for name, found in twins.items()}


@pytest.mark.parametrize("layout", [*LAYOUTS, "chunks of the head", "CP2, chunks of the head"])
def test_every_objective_is_its_twin_in_every_layout(
    gloo: GlooWorld, given: Sequence[Given], expected: Mapping[str, tuple[Found, Tensor]], layout: str
) -> None:
    """Claim: loss, counts of bounds and every weight's gradient are the twin's, wherever an answer's tokens lie.

    Packed rows of unequal answers, some tokens left out; one answer has a single token, so that a context-parallel rank
    has none of it. Gradients within 2e-5 of their norm: fp32 against derivatives in float64. ``pytest -rP`` prints.
    """
    where = {"chunks of the head": "micro-batches", "CP2, chunks of the head": "CP2"}.get(layout, layout)
    ranks, parallel, budget = LAYOUTS[where]
    chunk = 97 * 3 if "chunks" in layout else 2**25
    found = gloo.run(learnt, given, OBJECTIVES, budget, chunk, num_ranks=ranks, parallel=parallel)
    assert all(rank[name].sums == found[0][name].sums for rank in found for name in OBJECTIVES)
    for name, (wanted, gradient) in expected.items():
        mine = found[0][name]
        assert mine.gradient is not None
        off = float((mine.gradient - gradient).norm() / gradient.norm())
        print(f"{layout:24} {name:11} loss {mine.sums['policy_loss']:+.6f} ({wanted.loss:+.6f}) gradient off {off:.1e}")
        assert off < 2e-5, name
        assert mine.sums["policy_loss"] == pytest.approx(wanted.loss, abs=2e-5)
        counts = tuple(mine.sums[f"clip/{bound}"] for bound in ("low", "high", "dual"))
        assert counts == (wanted.low, wanted.high, wanted.dual), name
        assert mine.sums["ratio/sum"] == pytest.approx(wanted.ratio_sum, rel=1e-5)
        assert mine.sums["ratio/max"] == pytest.approx(wanted.ratio_max, rel=1e-5)


def test_bounds_hold_some_tokens_of_these_answers(expected: Mapping[str, tuple[Found, Tensor]]) -> None:
    """The comparison above is of gradients with bounds at work on both sides."""
    for name, (found, _) in expected.items():
        assert found.high > 0 or name == "sapo", name
        assert found.low > 0 or name in {"sapo", "cispo"}, name


def test_four_mini_batches_bind_and_tell_algorithms_apart(gloo: GlooWorld, given: Sequence[Given]) -> None:
    """Claim: on the same answers, from the same weights, no two algorithms hold the same tokens, and all hold some.

    SAPO has no bound; it differs by what its ratios come to. The table is printed (``pytest -rP``).
    """
    objectives = {
        name: replace(preset.objective, mini_batches=4, token_budget=preset.objective.token_budget and 64)
        for name, preset in ALGORITHMS.items()
        if not name.startswith("prism-") or name == "prism-grpo"
    }
    # A bound of 0.15 on a probability is out of reach of a vocabulary that is still nearly even.
    objectives["dppo"] = replace(objectives["dppo"], divergence_bound=0.01)
    (updates,) = gloo.run(four_mini_batches, given, objectives, 3e-3, num_ranks=1)
    rows = {name: update_figures(update) for name, update in updates.items()}
    print("algorithm     clip low  clip high  dual   ratio mean   max    KL       gradient norm")
    for name, row in rows.items():
        print(
            f"{name:12} {row['clip/low_share']:9.3f} {row['clip/high_share']:10.3f} {row['clip/dual_share']:5.3f} "
            f"{row['ratio/mean']:11.4f} {row['ratio/max']:7.3f} {row['ratio/kl']:9.5f} "
            f"{row['policy_grad_norm/mean']:9.4f}"
        )
    for name, update in updates.items():
        assert len(update.updates) == 4
        first, *later = (one.sums for one in update.updates)
        assert first["clip/low"] == first["clip/high"] == 0, "at the first update nothing has moved"
        assert name == "sapo" or sum(sums["clip/low"] + sums["clip/high"] for sums in later) > 0, name
    names = ("clip/low_share", "clip/high_share", "clip/dual_share", "ratio/mean")
    figures = {of: [row[name] for name in names] for of, row in rows.items()}
    for one, other in combinations(figures, 2):
        assert figures[one] != figures[other], (one, other)


@pytest.mark.parametrize("layout", ["micro-batches", "DP2", "CP2, micro-batches", "TP2-PP2-CP2"])
def test_scores_are_those_of_one_rank(gloo: GlooWorld, alone: Sequence[TokenScores], layout: str) -> None:
    """Claim: log-probs and entropies of every token are on every rank, by row, within 1e-5."""
    ranks, parallel, budget = LAYOUTS[layout]
    found = gloo.run(scores, budget, num_ranks=ranks, parallel=parallel)
    assert all(rank == found[0] for rank in found)
    for mine, wanted in zip(found[0], alone, strict=True):
        assert mine.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        assert mine.entropies == pytest.approx(wanted.entropies, abs=1e-5)


def test_scores_are_what_the_embedded_engine_drew_with(gloo: GlooWorld) -> None:
    """Claim: at TP2-PP2-CP2, packed in several micro-batches, the mini's log-probs are its replica's, within 1e-4."""
    groups = gloo.run(sample, num_ranks=1)[0]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    results = gloo.run(scores_of_the_mini, groups, 600, num_ranks=8, parallel=ParallelConfig(tp=2, pp=2, cp=2))
    worst = 0.0
    for found, num_batches in results:
        assert num_batches > 1
        for own, rollout in zip(found, rollouts, strict=True):
            difference = torch.tensor(own.logprobs) - torch.tensor(rollout.logprobs)
            worst = max(worst, float(difference.abs().max()))
    print(f"{len(rollouts)} answers: log-probs differ by {worst:.1e} at most")
    assert worst < 1e-4
