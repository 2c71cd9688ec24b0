"""Which answers count as right, and the AUC over a step's groups (blind spot: two ways to say one answer)."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.records import Record
from prism_megatron.data.render import Renderer
from prism_megatron.evaluation.health import tower_figures
from prism_megatron.game.figures import Right, game_row, is_right, judged_groups, rights_of
from prism_megatron.game.judge import Judgement
from prism_megatron.game.scoring_plan import TrunkCost
from prism_megatron.types import PreferenceGroup
from tests.unit.game.tiny_game import group, invalid, response, rollout

RECORD = Record("r", Path("x"), "q", None, "Yes", "s", "c", "set")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.from_folder(MINI_FOLDER / "policy")


def test_a_scene_knows_both_towers_and_a_record_its_answer(renderer: Renderer) -> None:
    """Claim: the faithful reference is right in both; of a record only the answer counts, whatever its case."""
    scene = SceneSource(renderer, split="heldout", seed=0, batch_size=1).batch(0)[0]
    right = renderer.decode(scene.reference.token_ids[:-1])
    assert is_right(scene, right, renderer) == (True, True)
    assert is_right(scene, right.replace("- ", "- blue ", 1), renderer) == (False, True)
    example = Example(scene.prompt, scene.reference, record=RECORD)
    for answer, expected in ((" yes ", True), ("Yes.", False), ("no", False)):
        text = f"<caption>c</caption><think>t</think><answer>{answer}</answer>"
        assert is_right(example, text, renderer) == (None, expected)
    assert is_right(example, "no tags", renderer) == (None, None)


def test_auc_compares_inside_groups_and_only_what_is_known(renderer: Renderer) -> None:
    """Claim: by hand, on two groups of records; perception has no pairs and so no value."""
    texts = [f"<caption>c</caption><think>t</think><answer>{answer}</answer>" for answer in ("yes", "no", "no")]
    rollouts = tuple(renderer.written(text, id="x") for text in texts)
    prompt = renderer.prompt("r", "q", [])
    example = Example(prompt, renderer.response("c", "t", "Yes"), record=RECORD)
    groups = [PreferenceGroup(prompt, example.reference, rollouts)] * 2
    scores: dict[tuple[int, int, int | None], float] = {}
    for g, own in enumerate([(2.0, 1.0, 3.0), (-5.0, -6.0, -5.0)]):  # one of two won; one, and a tie
        scores |= {(g, tower, None): 0.0 for tower in (0, 1)}
        scores |= {(g, tower, r): score for tower in (0, 1) for r, score in enumerate(own)}
    rights = rights_of([example, example], groups, renderer)
    perception, reasoning = (tower_figures(judged_groups(groups, scores, rights, tower)) for tower in (0, 1))
    assert (perception["auc"], perception["auc_pairs"]) == (None, 0)
    assert (reasoning["auc"], reasoning["auc_pairs"]) == (2.5 / 4, 4)


SCORES = {
    (1, 0): {None: 5.0, 0: 1.0, 2: 2.0, 3: 3.0},
    (1, 1): {None: 6.0, 0: 10.0, 2: 20.0, 3: 30.0},
    (0, 0): {None: 7.0, 0: 3.0, 1: 2.0, 2: 1.0},
}
"""by group and tower; group 0 has a reference without reasoning, and in group 1 rollout 1 is invalid"""


def two_groups() -> tuple[list[PreferenceGroup], Judgement]:
    alone = group(response([8]), *[rollout([9] * length, [10]) for length in (1, 2, 3)])
    answers = [rollout([9], [10, 11]), invalid(12), rollout([9, 9], [10]), rollout([9] * 4, [10] * 3)]
    scores = {(*key, r): score for key, own in SCORES.items() for r, score in own.items()}
    judgement = Judgement(scores, {"discriminator_loss": 0.5}, [], TrunkCost(0, 1, 0, 1, 0))
    return [alone, group(response([8], [9]), *answers)], judgement


def test_figures_are_those_of_valid_rollouts_and_of_the_towers_that_judge_them() -> None:
    """By hand. Agreement is of groups that both towers judge, each compared with itself."""
    groups, judgement = two_groups()
    row = game_row(groups, judgement, [None, None])
    assert (row["perception/pairs"], row["reasoning/pairs"]) == (6, 3)
    assert row["perception/reward_gap"] == pytest.approx((4 + 5 + 6 + 4 + 3 + 2) / 6)
    assert row["reasoning/reward_gap"] == pytest.approx(6 - 20)
    assert row["tower_agreement"] == pytest.approx(1.0)
    assert row["tower_agreement_groups"] == 1
    judged = judged_groups(groups, judgement.scores, [None, None], 1)
    assert [(one.reference, one.rollouts, one.lengths, one.right) for one in judged] == [
        (6.0, [10.0, 20.0, 30.0], [2, 1, 3], None)
    ]


def test_each_tower_is_held_to_what_is_known_of_its_segment() -> None:
    """What is known of an invalid rollout does not matter; one unknown valid rollout leaves the group out."""
    groups, judgement = two_groups()
    known: list[list[Right]] = [
        [(True, None), (False, None), (True, None)],
        [(True, False), (None, None), (False, True), (False, None)],
    ]
    perception, reasoning = (judged_groups(groups, judgement.scores, known, tower) for tower in (0, 1))
    assert [one.right for one in perception] == [[True, False, True], [True, False, False]]
    assert [one.right for one in reasoning] == [None]
