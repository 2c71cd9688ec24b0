"""Drift that is planted into real solutions is found, in its order, and two halves of one set are not apart."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from prism_megatron.evaluation.drift.compare import Embed, Measured, Plan, compare
from prism_megatron.evaluation.drift.embeddings import read_embeddings
from prism_megatron.evaluation.drift.responses import Responses
from tests.unit.evaluation.drift.made_up import first_half, reasonings, with_words_dropped, words_at_random

PLAN = Plan(permutations=199)
LEAST_P = 1 / 200


@pytest.fixture(params=["words at random", "wordllama"])
def embed(request: pytest.FixtureRequest) -> Embed:
    """A point for each word, which needs no files, and wordllama's."""
    if request.param == "words at random":
        return words_at_random
    folder = os.environ.get("PRISM_EMBEDDINGS")
    found = read_embeddings(None if folder is None else Path(folder))
    if found is None:
        pytest.skip("no embeddings: install wordllama, or name a folder with its files by PRISM_EMBEDDINGS")
    return found


def _solutions(shared_dir: Path, name: str) -> list[str]:
    lines = (shared_dir / "data" / name / "data.jsonl").read_text(encoding="utf-8").splitlines()
    found = [solution for line in lines if (solution := json.loads(line)["solution"])]
    random.Random(0).shuffle(found)
    return found


def _reasoning(found: list[Measured], kind: str = "mmd2", what: str = "reasoning") -> Measured:
    (one,) = (one for one in found if one.what == what and one.kind == kind)
    return one


def test_planted_drift_is_found_in_its_order(shared_dir: Path, embed: Embed) -> None:
    """Claim: 300 solutions of tabmwp against the other 300 are not apart; 15 % of words dropped, the second half cut
    off and puzzlevqa's solutions are, each further than the one before, with the least p there is.

    What is damaged is compared with what it was made of, question by question, as a policy is with its base.
    """
    texts, other = _solutions(shared_dir, "tabmwp"), _solutions(shared_dir, "puzzlevqa")[:300]
    half, draw = len(texts) // 2, random.Random(1)
    own = reasonings("own", texts[:half])

    def distance(second: Responses) -> tuple[float, float]:
        found = _reasoning(compare(own, second, embed, PLAN)).distance
        assert found is not None
        return found.value, found.p

    same, p = distance(reasonings("the other half", texts[half:], first_id=1000))
    assert abs(same) < 1e-3 and p > 0.05
    damage: list[Callable[[str], str]] = [lambda text: with_words_dropped(text, 0.15, draw), first_half]
    found = [distance(reasonings("damaged", [one(text) for text in texts[:half]])) for one in damage]
    found.append(distance(reasonings("puzzlevqa", other, first_id=1000)))
    assert [p for _, p in found] == [LEAST_P] * 3
    dropped, cut, apart = (value for value, _ in found)
    assert 0 < dropped < 0.1 * cut < 0.1 * apart


def test_words_dropped_from_other_questions_answers_are_not_seen(shared_dir: Path, embed: Embed) -> None:
    """A blind spot that docs/drift.md names: a mean of words is nearly the same without every seventh of them."""
    texts, draw = _solutions(shared_dir, "tabmwp"), random.Random(1)
    half = len(texts) // 2
    dropped = reasonings("dropped", [with_words_dropped(text, 0.15, draw) for text in texts[half:]], first_id=1000)
    found = compare(reasonings("own", texts[:half]), dropped, embed, PLAN)
    distance = _reasoning(found).distance
    assert distance is not None and abs(distance.value) < 1e-3 and distance.p > 0.05
    words = _reasoning(found, "wasserstein", "reasoning_words").distance
    assert words is not None and words.value > 0.1 * 45, "and their number shows it, at about 45 words a solution"


def test_form_sees_what_was_cut(shared_dir: Path) -> None:
    """Claim: the second half of the words gone, the distance of their numbers is the mean of what went, within 1e-9.

    Longer texts stay the longer ones, so that no smaller sum of moves makes one distribution of the other.
    """
    texts = _solutions(shared_dir, "tabmwp")
    found = compare(reasonings("own", texts), reasonings("cut", map(first_half, texts)), None, PLAN)
    words = _reasoning(found, "wasserstein", "reasoning_words")
    assert words.distance is not None and words.pairs
    gone = sum(len(text.split()) // 2 for text in texts) / len(texts)
    assert words.distance.value == pytest.approx(gone, abs=1e-9)
    assert words.distance.p == LEAST_P


def test_a_cut_is_seen_at_equal_lengths_too(shared_dir: Path, embed: Embed) -> None:
    """Claim: long solutions cut in half are apart from whole ones of their length; those are as long within a word."""
    texts = _solutions(shared_dir, "tabmwp")
    half = len(texts) // 2
    cut = reasonings("cut", map(first_half, texts[half:]), first_id=1000)
    found = _reasoning(compare(reasonings("own", texts[:half]), cut, embed, PLAN), "mmd2_same_length")
    assert found.distance is not None and found.distance.p <= 0.01
    assert abs((found.first_mean or 0) - (found.second_mean or 0)) < 1
