"""How a policy's answers moved: before is the base's, a fall is negative, intervals are those of paired differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism_megatron.engine.runtime import World
from prism_megatron.run.session import Session
from prism_megatron.stages.sft.drift import Drift, Values, lines_of


class Answering(Drift):
    """Of which the answers are given."""

    def __init__(self, *answers: list[float]) -> None:
        nobody: Any = None
        super().__init__(nobody, (), nobody, seed=0)
        self.left = list(answers)

    def _answered(self, *, version: int) -> Values:
        del version
        return {"greedy": {"answer right": self.left.pop(0)}}


@pytest.fixture
def session(world: World) -> Session:
    return Session(world, Path(), quiet=True)


def test_a_fall_is_a_negative_change(session: Session) -> None:
    drift = Answering([1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    drift.begin(session)
    found = drift.end(session)["greedy"]["answer right"]
    assert [found[name][0] for name in ("before", "after", "change")] == [0.75, 0.25, -0.5]
    mean, low, high = found["change"]
    assert -1.0 <= low < mean < high <= 0.0
    assert "0.750   0.250   -0.500 [" in lines_of({"greedy": {"answer right": found}})[1]


def test_the_first_answers_are_kept(session: Session) -> None:
    """Claim: a run that goes on has the base's answers from its checkpoint, and does not ask again."""
    drift = Answering([0.0, 0.0])
    drift.before = {"greedy": {"answer right": [1.0, 1.0]}}
    drift.begin(session)
    assert drift.end(session)["greedy"]["answer right"]["change"][0] == -1.0
