"""Held-out prompts, from answers that are known: when they are asked, what is made of them, what is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling import exam as module
from prism_megatron.sampling.exam import Exam, ExamTimes
from prism_megatron.sampling.shares import Gathered
from prism_megatron.types import RolloutGroup
from tests.unit.stages.tiny_rewards import example, rewarded, rollout

EXAMPLES = [example("a"), example("b")]
RIGHTS = {1: [[True], [False]], 4: [[True, False, False, False], [False] * 4]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sampling, int, int, int]]:
    """Every call's sampling, number of answers, seed and step; sampled answers have four tokens, greedy ones two."""
    calls: list[tuple[Sampling, int, int, int]] = []

    def answer(_rollout: Any, examples: Any, sampling: Sampling, _reward: Any, *, n: int, seed: int, step: int,
               world: Any) -> Gathered:  # fmt: skip
        calls.append((sampling, n, seed, step))
        tokens = 2 if sampling.temperature == 0 else 4
        groups = [RolloutGroup(one.prompt, one.reference, (rollout(tokens),) * n) for one in examples]
        return Gathered(groups, [[rewarded(right, valid=right) for right in of_prompt] for of_prompt in RIGHTS[n]])

    monkeypatch.setattr(module, "sample_rewarded", answer)
    return calls


def exam(*names: str, num_samples: int = 4) -> Exam:
    nobody: Any = None
    examples = [example(name) for name in names] or EXAMPLES
    return Exam(examples, nobody, Sampling(0.8, 0.9, 50), nobody, num_samples=num_samples, seed=3,
                times=ExamTimes(steps=10, every=4, save_every=3), world=nobody)  # fmt: skip


def test_they_are_asked_regularly_before_checkpoints_and_at_the_end() -> None:
    """Claim: of ten steps; never in between with 0; after any step that ends the run."""
    times = ExamTimes(steps=10, every=4, save_every=3)
    assert [step for step in range(10) if times.asks_after(step)] == [2, 3, 5, 7, 8, 9]
    assert [step for step in range(10) if times.saves_after(step)] == [2, 5, 8, 9]
    at_the_end = ExamTimes(steps=10, every=0, save_every=3)
    assert [step for step in range(10) if at_the_end.asks_after(step)] == [9]
    assert at_the_end.asks_after(4, ends=True) and times.saves_after(4, ends=True)


def test_means_over_samples_and_any_of_them(asked: list[tuple[Sampling, int, int, int]]) -> None:
    """Claim: one of four right is a mean of 1/4 and a pass; greedy answers are not cut by top-p.

    Draws are keyed alike after every step.
    """
    one = exam()
    assert one.sit(4).row == {
        "eval/prompts": 2,
        "eval/greedy/accuracy": 0.5, "eval/greedy/format": 0.5, "eval/greedy/tokens": 2.0,
        "eval/sampled/accuracy": 0.125, "eval/sampled/format": 0.125, "eval/sampled/tokens": 4.0,
        "eval/sampled/pass": 0.5,
    }  # fmt: skip
    seen = {(sampling.temperature, sampling.top_p, *others) for sampling, *others in asked}
    assert seen == {(0.8, 0.9, 4, 3, 0), (0.0, 1.0, 1, 3, 0)}


def test_the_first_policy_is_asked_once(asked: list[tuple[Sampling, int, int, int]]) -> None:
    one = exam()
    one.begin()
    one.begin()
    assert len(asked) == 2


def test_what_moved_is_since_the_first_and_asked_anew_only_where_it_is_unknown(
    asked: list[tuple[Sampling, int, int, int]],
) -> None:
    one = exam()
    one.begin()
    one.sit(9)
    assert one.moved()["greedy/accuracy"]["change"] == (0.0, 0.0, 0.0) and len(asked) == 4
    again = exam()
    again.restore(json.loads(json.dumps(one.to_plain())))
    assert again.moved() == one.moved() and len(asked) == 6


def test_the_best_is_the_highest_of_those_that_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: steps 3 and 7 have no checkpoint, so that what they reach is not held against those that have one."""
    one, accuracies = exam(), {2: 0.2, 3: 0.9, 5: 0.5, 7: 0.9, 8: 0.5, 9: 0.6}
    best = []
    for step, accuracy in accuracies.items():
        monkeypatch.setattr(one, "ask", lambda accuracy=accuracy: {"sampled/accuracy": [accuracy]})
        best.append(one.sit(step).best)
    assert (one.best, best) == (0.6, [True, False, True, False, False, True])
    monkeypatch.setattr(one, "ask", lambda: {"sampled/accuracy": [0.7]})
    assert one.sit(4, ends=True).best, "the step that ends a run has a checkpoint"


@pytest.mark.parametrize(("names", "num_samples"), [(("b", "a"), 4), (("a",), 4), (("a", "b"), 2)])
def test_answers_to_other_prompts_are_no_start(
    names: tuple[str, ...], num_samples: int, asked: list[tuple[Sampling, int, int, int]]
) -> None:
    """Claim: a run that goes on keeps its first answers and its best, unless it asks others, or as often as not."""
    one = exam("a", "b")
    one.begin()
    one.sit(2)
    kept = json.loads(json.dumps(one.to_plain()))
    same, other = exam("a", "b"), exam(*names, num_samples=num_samples)
    same.restore(kept)
    other.restore(kept)
    assert (same.before, same.best) == (one.before, one.best) and one.best == 0.125
    assert (other.before, other.best) == (None, None)
    del asked


def test_what_was_kept_without_an_exam_is_no_start_either() -> None:
    one = exam()
    one.restore({"cursor": 3})
    assert (one.before, one.best) == (None, None)
