"""Scenes are the same everywhere, splits never share content, and pictures show what the counts say."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import pytest

from prism_megatron.data.scenes import (
    BACKGROUND,
    BUCKETS,
    CELL_SIZE,
    COLOURS,
    DRIFT_QUESTIONS,
    NUM_BUCKETS,
    QUESTION_KINDS,
    SHAPES,
    Kind,
    Placement,
    Question,
    Scene,
    Split,
    content_bucket,
    evaluate,
    make_scene,
    scene_of,
)

SPLITS: tuple[Split, ...] = ("pretrain", "sft", "align", "heldout")


def scenes(split: Split, count: int = 300, seed: int = 0) -> list[Scene]:
    return [make_scene(split, seed=seed, index=index) for index in range(count)]


def test_scenes_are_a_function_of_split_seed_and_index() -> None:
    """Claim: a golden digest of contents holds in any process and order. Blind spot: other numpy major versions."""
    backwards = [make_scene("align", seed=3, index=index) for index in reversed(range(20))]
    assert backwards[::-1] == scenes("align", 20, seed=3)
    digest = hashlib.sha256(repr([(s.counts, s.question, s.placements) for s in scenes("align", 20)]).encode())
    assert digest.hexdigest()[:16] == "e459bcf10813a979"


def test_every_bucket_belongs_to_exactly_one_split() -> None:
    owners = [bucket for buckets in BUCKETS.values() for bucket in buckets]
    assert sorted(owners) == list(range(NUM_BUCKETS))


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_share_no_content_with_the_same_question(one: Split, other: Split) -> None:
    """Claim: no (content, question) pair of one split occurs in another, whatever the seeds."""
    pairs = {(scene.counts, scene.question.text) for scene in scenes(one, seed=0)}
    assert pairs.isdisjoint((scene.counts, scene.question.text) for scene in scenes(other, seed=1))
    assert all(content_bucket(scene.counts, scene.question) in BUCKETS[other] for scene in scenes(other, seed=1))


def test_scenes_keep_their_rules() -> None:
    """Claim: 2-3 kinds, 1-3 of each, canonical order, answers never negative, every question kind occurs."""
    drawn = scenes("pretrain")
    for scene in drawn:
        assert 2 <= len(scene.counts) <= 3
        assert all(1 <= count <= 3 for _, count in scene.counts)
        order = [(list(COLOURS).index(kind.colour), kind.shape) for kind, _ in scene.counts]
        assert order == sorted(order)
        assert scene.answer in ("yes", "no") or 0 <= int(scene.answer) <= 9
        assert len(set(scene.question.operands)) == len(scene.question.operands)
    assert {scene.question.kind for scene in drawn} == set(QUESTION_KINDS)
    absent = sum(0 in scene.operand_counts for scene in drawn) / len(drawn)
    assert 0.05 < absent < 0.2  # 15 % of all but differences


def test_pictures_show_the_counts() -> None:
    """Claim: counting coloured cells in the pixels gives the counts per colour. Blind spot: shapes."""
    for scene in scenes("heldout", 50):
        pixels = np.asarray(scene.image()).astype(int)
        assert pixels.shape == (96, 96, 3)
        seen = dict.fromkeys(COLOURS, 0)
        for row in range(3):
            for column in range(3):
                cell = pixels[row * CELL_SIZE : (row + 1) * CELL_SIZE, column * CELL_SIZE : (column + 1) * CELL_SIZE]
                painted = cell[(cell != BACKGROUND).any(axis=-1)]
                if len(painted):
                    distance = {name: np.abs(painted[0] - rgb).sum() for name, rgb in COLOURS.items()}
                    seen[min(distance, key=lambda name: distance[name])] += 1
        expected = dict.fromkeys(COLOURS, 0)
        for kind, count in scene.counts:
            expected[kind.colour] += count
        assert seen == expected


def test_shapes_are_twice_their_radius_wide() -> None:
    """Whatever the shape, the box around its pixels goes from x - radius to x + radius, the last not included."""
    for kind in (Kind("red", shape) for shape in SHAPES):
        placement = Placement(kind, 40, 30, 9, (1, 2, 3))
        scene = Scene("align", 0, 0, ((kind, 1),), Question("count", (kind,)), (placement,))
        rows, columns = np.nonzero((np.asarray(scene.image()) == (1, 2, 3)).all(axis=-1))
        assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (31, 49, 21, 39), kind


def test_answers_follow_from_the_counts() -> None:
    assert evaluate("count", (2,)) == "2"
    assert evaluate("sum3", (1, 2, 3)) == "6"
    assert evaluate("difference", (3, 1)) == "2"
    assert evaluate("comparison", (2, 2)) == "no"
    assert evaluate("comparison", (2, 1)) == "yes"


def test_an_absent_kind_counts_zero() -> None:
    scene = make_scene("align", seed=0, index=0)
    present = {kind for kind, _ in scene.counts}
    assert all(scene.count_of[Kind(c, "circle")] == 0 for c in COLOURS if Kind(c, "circle") not in present)


def test_the_second_world_asks_in_its_own_shares() -> None:
    """Claim: 2,000 scenes have their kinds of questions in the shares that are stated, within four standard errors."""
    drawn = [make_scene("sft", seed=0, index=index, world="drift") for index in range(2_000)]
    sums = DRIFT_QUESTIONS["sum3"]
    of_three_kinds = 0.65  # a sum of three is one of two elsewhere
    expected = {**DRIFT_QUESTIONS, "sum3": sums * of_three_kinds, "sum2": DRIFT_QUESTIONS["sum2"] + sums * 0.35}
    for kind, share in expected.items():
        seen = sum(scene.question.kind == kind for scene in drawn) / len(drawn)
        assert seen == pytest.approx(share, abs=4 * (share * (1 - share) / len(drawn)) ** 0.5), kind
    assert sum(expected.values()) == pytest.approx(1)
    assert all(content_bucket(scene.counts, scene.question) in BUCKETS["sft"] for scene in drawn)


def test_the_worlds_share_no_scene_and_an_id_names_one() -> None:
    """Claim: scenes of equal numbers differ between worlds, also in their ids, and ``scene_of`` finds each again."""
    first, second = make_scene("align", seed=3, index=7), make_scene("align", seed=3, index=7, world="drift")
    assert (first.id, second.id) == ("scene-align-3-7", "scene-drift-align-3-7")
    both = [[make_scene("align", seed=3, index=i, world=world) for i in range(40)] for world in ("habits", "drift")]
    assert sum(one.counts == other.counts for one, other in zip(*both, strict=True)) <= 2
    assert scene_of(first.id) == first
    assert scene_of(second.id) == second
    for wrong in (
        "scene-habits-align-3-7",
        "scene-align-3",
        "scene-other-3-7",
        "scene-align-3-7 ",
        "scene-align-\u0663-7",
    ):
        assert scene_of(wrong) is None, wrong
