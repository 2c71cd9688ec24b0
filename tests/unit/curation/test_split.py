"""The score and who goes where: by hand-made cases, and against a slow twin."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.tools.curate import Quality
from prism_megatron.curation.files import Problem, Row
from prism_megatron.curation.split import ALIGN, SFT, quality_of, split

WEIGHTS = Quality()
LONG = "It is the circle on the left because it is the one that touches the line."


def found(
    *, unaided: bool = True, attempts: int = 1, caption: int = 100, words: int = 200, rate: float | None = 0.0
) -> dict[str, Any]:
    """What steps have found of a row, by numbers of words."""
    answer = {"unaided": unaided, "attempts": attempts, "caption": "word " * caption, "solution": "word " * words}
    return {"answer": answer, "select": {"pass_rate": rate}}


def row(position: int, answer: str = "3", **about: Any) -> Row:
    problem = Problem(position, f"p{position}", "/pool", position + 1, "/pool/a.png", "ab" * 32, "How many?", None,
                      answer, "text", "mine")  # fmt: skip
    return Row(problem, found=found(**about))


def write(path: Path, rows: list[Row]) -> Path:
    path.write_bytes(b"".join(one.line() for one in rows))
    return path


@pytest.mark.parametrize(
    ("about", "score"),
    [
        ({}, 1.0),
        ({"unaided": False}, 4 / 6),
        ({"attempts": 3}, (2 + 1 / 3 + 3) / 6),
        ({"rate": 0.25}, (5 + 0.75) / 6),
        ({"rate": None, "unaided": False}, 3 / 5),
        ({"caption": 50, "words": 50}, (4 + 0.5 + 0.25) / 6),
        ({"caption": 1000, "words": 1000}, 1.0),
        ({"unaided": False, "attempts": 4, "rate": 1.0, "caption": 0, "words": 0}, 0.25 / 6),
    ],
)
def test_the_score_is_the_stated_mean(about: dict[str, Any], score: float) -> None:
    assert quality_of(found(**about), WEIGHTS) == pytest.approx(score, abs=1e-12)


def test_a_weight_of_zero_leaves_its_part_out() -> None:
    weights = replace(WEIGHTS, unaided=0.0, at_once=0.0, hard=0.0, caption=0.0)
    assert quality_of(found(unaided=False, attempts=9, caption=0, words=100), weights) == 0.5
    only_hard = replace(weights, reasoning=0.0, hard=1.0)
    assert quality_of(found(rate=0.25), only_hard) == 0.75
    assert quality_of(found(rate=None), only_hard) == 0.0, "nothing to weigh"


def test_the_best_that_rules_can_check_go_to_alignment(tmp_path: Path) -> None:
    """Claim: as many as asked for, whatever others score, and all others go to fine-tuning, in their order."""
    rows = [row(0, caption=10), row(1, LONG), row(2, caption=90), row(3, caption=50), row(4, unaided=False)]
    told = {one.problem.id: one.found["split"] for one in
            split(write(tmp_path / "a.jsonl", rows), best=2, weights=WEIGHTS, seed=1)}  # fmt: skip
    assert {name: about["to"] for name, about in told.items()} == {
        "p0": SFT, "p1": SFT, "p2": ALIGN, "p3": ALIGN, "p4": SFT,
    }  # fmt: skip
    assert [about["by_rules"] for about in told.values()] == [True, False, True, True, True]
    assert list(told) == ["p0", "p1", "p2", "p3", "p4"]


def test_against_a_slow_twin(tmp_path: Path) -> None:
    """Claim: the choice is that of sorting all by score and then by a hash that the seed keys."""
    from prism_megatron.curation.split import _tie

    draw = random.Random(20260)
    rows = [row(number, answer=draw.choice(["3", LONG]), caption=draw.choice([10, 20, 30])) for number in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    for seed in (1, 2):
        may = [one for one in rows if one.problem.answer == "3"]
        may.sort(key=lambda one: (-quality_of(one.found, WEIGHTS), _tie(one.problem.id, seed)))
        wanted = {one.problem.id for one in may[:40]}
        chosen = {one.problem.id for one in split(path, best=40, weights=WEIGHTS, seed=seed)
                  if one.found["split"]["to"] == ALIGN}  # fmt: skip
        assert chosen == wanted
    everything = list(split(path, best=10_000, weights=WEIGHTS, seed=1))
    assert sum(one.found["split"]["to"] == ALIGN for one in everything) == len(may)
    assert all(one.found["split"]["to"] == SFT for one in split(path, best=0, weights=WEIGHTS, seed=1))


def test_equals_are_drawn_by_the_seed(tmp_path: Path) -> None:
    """Claim: with another seed others of equal score are chosen, and never by their place in the pool alone."""
    path = write(tmp_path / "a.jsonl", [row(number) for number in range(100)])
    chosen = [
        {one.problem.position for one in split(path, best=50, weights=WEIGHTS, seed=seed)
         if one.found["split"]["to"] == ALIGN}
        for seed in (1, 2)
    ]  # fmt: skip
    assert len(chosen[0]) == len(chosen[1]) == 50 and chosen[0] != chosen[1]
    assert chosen[0] != set(range(50))
