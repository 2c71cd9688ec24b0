"""The misreading teacher's texts are spread as the faithful teacher's are: permutation tests, which can fail.

Each text becomes counts of categories (its length, its items, its numbers, …). What two samples of texts differ by is
the total variation between their pooled categories; how often a random division of all texts differs as much is p.
Texts are divided, not numbers, because the numbers of one text belong together. Blind spot: what is in no statistic
here (a discriminator that reads text alone looks for the rest, see ``tests/integration/test_drift_world.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.data.scenes import Scene, make_scene
from prism_megatron.data.segments import response_text
from prism_megatron.data.teachers import Writing, misreading, write

SIZE = 5_000
DIVISIONS = 999
SIGNIFICANCE = 0.05
SEED = 0

STATISTICS: dict[str, Callable[[Writing], list[str]]] = {
    "length in characters": lambda one: [str(len(response_text(*one)))],
    "items": lambda one: [str(len(one.caption.splitlines()))],
    "counts of the caption": lambda one: re.findall(r": (\d+)", one.caption),
    "counts of the caption, in order": lambda one: [",".join(re.findall(r": (\d+)", one.caption))],
    "steps": lambda one: [str(len(one.think.splitlines()))],
    "operands": lambda one: re.findall(r": (\d+)", one.think),
    "equation": lambda one: re.findall(r"^\d.*", one.think, re.MULTILINE) or ["none"],
    "answer": lambda one: [one.answer],
}


def scenes(first: int, world: MiniWorld = "drift") -> list[Scene]:
    return [make_scene("sft", seed=SEED, index=first + i, world=world) for i in range(SIZE)]


@pytest.fixture(scope="module")
def faithful() -> list[Writing]:
    return [write(scene, "faithful") for scene in scenes(0)]


@pytest.fixture(scope="module")
def others() -> list[Scene]:
    """Other scenes than the faithful teacher's, so that the samples are independent."""
    return scenes(SIZE)


def p_value(one: Sequence[Writing], other: Sequence[Writing], statistic: Callable[[Writing], list[str]]) -> float:
    """How often a random division of both samples' texts is as unequal as this one."""
    found = [statistic(text) for text in (*one, *other)]
    place = {name: i for i, name in enumerate(sorted({name for names in found for name in names}))}
    counts_T_C = np.zeros((len(found), len(place)))
    for text, names in enumerate(found):
        for name in names:
            counts_T_C[text, place[name]] += 1
    rng = np.random.default_rng(SEED)
    in_one_D_T = np.zeros((1 + DIVISIONS, len(found)), dtype=bool)
    in_one_D_T[0, : len(one)] = True
    for division in range(DIVISIONS):
        in_one_D_T[1 + division, rng.permutation(len(found))[: len(one)]] = True
    first_D_C = in_one_D_T @ counts_T_C
    second_D_C = counts_T_C.sum(axis=0) - first_D_C
    shares = (part / part.sum(axis=1, keepdims=True) for part in (first_D_C, second_D_C))
    distance_D = np.abs(np.subtract(*shares)).sum(axis=1) / 2
    return float(np.mean(distance_D >= distance_D[0] - 1e-12))


def rejected(one: Sequence[Writing], other: Sequence[Writing]) -> dict[str, float]:
    """The statistics in which the samples differ, with p, corrected for their number (Bonferroni)."""
    values = {name: p_value(one, other, statistic) for name, statistic in STATISTICS.items()}
    return {name: p for name, p in values.items() if p * len(values) < SIGNIFICANCE}


def test_text_does_not_tell_the_teachers_apart(faithful: list[Writing], others: list[Scene]) -> None:
    """Claim: at n = 5,000 a teacher no statistic of the text is rejected at 5 % over all of them together."""
    assert rejected(faithful, [write(scene, "misreading") for scene in others]) == {}


def test_a_difference_in_one_of_ten_texts_is_seen(faithful: list[Writing], others: list[Scene]) -> None:
    """Claim: the tests have power: a tenth of texts by the teacher with habits is found by its items and lengths."""
    mixed = [write(scene, "misreading" if i % 10 else "sloppy", seed=SEED) for i, scene in enumerate(others)]
    assert {"length in characters", "items", "steps"} <= rejected(faithful, mixed).keys()


def test_counts_that_are_misread_one_way_are_seen(faithful: list[Writing], others: list[Scene]) -> None:
    """Claim: a tenth of texts that read three where one is, and not the other way, is found by what they count."""

    def one_way(scene: Scene) -> Writing:
        return write(replace(scene, counts=tuple((kind, max(n, 4 - n)) for kind, n in scene.counts)), "faithful")

    mixed = [misreading(scene) if i % 10 else one_way(scene) for i, scene in enumerate(others)]
    assert {"counts of the caption", "operands"} <= rejected(faithful, mixed).keys()


def test_the_samples_are_not_of_the_world_where_questions_tell(others: list[Scene]) -> None:
    """Claim: no difference is asked for: its larger count stands first, so that a misread one is known by its sign."""
    assert {scene.question.kind for scene in others} == {"count", "sum2", "sum3", "comparison"}
