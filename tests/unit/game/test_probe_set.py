"""The probe set on the mini's discriminator, with answers from a script.

Blind spot: several ranks, which ``tests/integration/test_controls.py`` has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from prism_megatron.data.loader import Example
from prism_megatron.errors import CheckpointError
from prism_megatron.game.judge import JudgePlan
from prism_megatron.game.probe_set import ProbeSet
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.types import Rollout, VersionSpan
from tests.mini_players import judge_plan
from tests.unit.game.mini_judge import MiniJudge, answer, mini_judge, scenes

PROMPTS, ROLLOUTS, DRAW = 3, 3, 77


@pytest.fixture(scope="module")
def judge() -> Iterator[MiniJudge]:
    with mini_judge() as made:
        yield made


def plan(judge: MiniJudge) -> JudgePlan:
    return judge_plan(judge.form, tokens=4096, seed=5, balance=0.005)


class Script:
    """Gives every prompt answers of its own, of which the middle one is cut short."""

    policy_version = 0

    def __init__(self, judge: MiniJudge, examples: Sequence[Example]) -> None:
        self._judge = judge
        self._examples = {example.prompt.id: example for example in examples}
        self.drawn: list[tuple[int, int]] = []

    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        self.drawn.append((request.seed, request.step))
        return [
            tuple(self._rollout(prompt.id, number) for number in numbers)
            for prompt, numbers in zip(request.prompts, request.wanted, strict=True)
        ]

    def _rollout(self, prompt: str, number: int) -> Rollout:
        given = answer(self._examples[prompt], self._judge.renderer, number, valid=number != 1)
        size = len(given.token_ids)
        return Rollout(given.token_ids, (0.0,) * size, "stop", (VersionSpan(0, 0, size),), given.segments)


def drawn(judge: MiniJudge) -> tuple[ProbeSet, Script]:
    source = scenes(judge.renderer, PROMPTS)
    engine: Any = Script(judge, source.batch(0))
    queue = RolloutQueue(
        engine, source.batch, Sampling(), n=ROLLOUTS, seed=5, world=judge.world, steps=range(1), ahead=0
    )
    return ProbeSet.draw(source, queue, step=DRAW), engine


def test_probes_are_the_valid_answers_under_a_step_of_their_own(judge: MiniJudge) -> None:
    """No step of the run has the number, so none draws what the probes drew."""
    probes, engine = drawn(judge)
    assert engine.drawn == [(5, DRAW)]
    assert [group.prompt.id for group in probes.groups] == [f"scene-heldout-5-{index}" for index in range(PROMPTS)]
    for example, group in zip(probes.examples, probes.groups, strict=True):
        assert group.rollouts == tuple(answer(example, judge.renderer, number) for number in (0, 2))
        assert group.reference == example.reference


def test_probes_come_back_from_a_checkpoint(judge: MiniJudge) -> None:
    """Claim: with the prompts made again, also by a run of more a step, all groups are those of before and score alike.

    A run of other prompts is refused.
    """
    probes, _ = drawn(judge)
    plain = json.loads(json.dumps(probes.to_plain()))
    restored = ProbeSet.of_plain(plain, scenes(judge.renderer, PROMPTS + 2))
    assert [(g.prompt.id, g.reference, g.rollouts) for g in restored.groups] == [
        (g.prompt.id, g.reference, g.rollouts) for g in probes.groups
    ]
    assert score(judge, restored) == score(judge, probes)
    with pytest.raises(CheckpointError, match="scene-heldout-5-0"):
        ProbeSet.of_plain(plain, scenes(judge.renderer, PROMPTS, seed=6))


def score(judge: MiniJudge, probes: ProbeSet) -> dict[str, Any]:
    return dict(probes.score(judge.engine, plan(judge), judge.renderer, world=judge.world))


def test_scoring_probes_trains_nothing(judge: MiniJudge) -> None:
    """Both towers have their pairs, each figure under ``probe/``; no byte of weights or moments is another one."""
    probes, _ = drawn(judge)
    before = judge.digest()
    figures = score(judge, probes)
    assert judge.digest() == before
    assert figures["probe/perception/pairs"] == figures["probe/reasoning/pairs"] == PROMPTS * 2
    assert all(name.startswith("probe/") for name in figures)
