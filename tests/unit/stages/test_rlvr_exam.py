"""Figures of held-out prompts, from answers that are known."""

from __future__ import annotations

from typing import Any

import pytest

from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling.shares import Gathered
from prism_megatron.stages.rlvr import exam as module
from prism_megatron.stages.rlvr.exam import Exam, best_of, lines_of
from prism_megatron.types import RolloutGroup
from tests.unit.stages.tiny_rewards import example, rewarded, rollout

EXAMPLES = [example("a"), example("b")]
RIGHTS = {1: [[True], [False]], 4: [[True, False, False, False], [False] * 4]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sampling, int, int]]:
    """Every call's sampling, number of answers and seed; sampled answers have four tokens, greedy ones two."""
    calls: list[tuple[Sampling, int, int]] = []

    def answer(_rollout: Any, examples: Any, sampling: Sampling, _reward: Any, *, n: int, seed: int, step: int,
               world: Any) -> Gathered:  # fmt: skip
        calls.append((sampling, n, seed))
        tokens = 2 if sampling.temperature == 0 else 4
        groups = [RolloutGroup(one.prompt, one.reference, (rollout(tokens),) * n) for one in examples]
        return Gathered(groups, [[rewarded(right, valid=right) for right in of_prompt] for of_prompt in RIGHTS[n]])

    monkeypatch.setattr(module, "sample_rewarded", answer)
    return calls


def exam() -> Exam:
    nobody: Any = None
    return Exam(EXAMPLES, nobody, Sampling(0.8, 0.9, 50), nobody, num_samples=4, seed=3, world=nobody)


def test_means_over_samples_and_any_of_them(asked: list[tuple[Sampling, int, int]]) -> None:
    """Claim: one of four right is a mean of 1/4 and a pass; greedy answers are not cut by top-p."""
    one = exam()
    assert one.row(one.ask()) == {
        "eval/prompts": 2,
        "eval/greedy/accuracy": 0.5, "eval/greedy/format": 0.5, "eval/greedy/tokens": 2.0,
        "eval/sampled/accuracy": 0.125, "eval/sampled/format": 0.125, "eval/sampled/tokens": 4.0,
        "eval/sampled/pass": 0.5,
    }  # fmt: skip
    assert {(sampling.temperature, sampling.top_p, n, seed) for sampling, n, seed in asked} == {
        (0.8, 0.9, 4, 3), (0.0, 1.0, 1, 3)}  # fmt: skip


def test_the_first_policy_is_asked_once(asked: list[tuple[Sampling, int, int]]) -> None:
    one = exam()
    one.begin()
    one.begin()
    assert len(asked) == 2


def test_changes_are_paired(asked: list[tuple[Sampling, int, int]]) -> None:
    """Claim: both prompts rose by a quarter, so that the change has no spread although the levels have."""
    one = exam()
    one.begin()
    assert one.before is not None
    one.latest = {name: [value + 0.25 for value in values] for name, values in one.before.items()}
    moved = one.moved()["greedy/accuracy"]
    assert moved["change"] == pytest.approx((0.25, 0.25, 0.25)) and moved["before"][0] == 0.5
    assert moved["before"][1] < moved["before"][0] < moved["before"][2]
    (line,) = [line for line in lines_of({"greedy/accuracy": moved}) if line.startswith("greedy/accuracy")]
    assert line.split() == ["greedy/accuracy", "0.500", "[0.000,", "1.000]", "0.750", "+0.250", "[+0.250,", "+0.250]"]


def test_the_best_is_the_highest_that_was_asked() -> None:
    best, found = None, []
    for accuracy in (0.2, None, 0.5, 0.5, 0.4, 0.6):
        best, is_best = best_of(best, {} if accuracy is None else {"eval/sampled/accuracy": accuracy})
        found.append(is_best)
    assert (best, found) == (0.6, [True, False, True, False, False, True])
