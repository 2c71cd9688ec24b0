"""Which answers count as right, and the AUC over a step's groups (blind spot: two ways to say one answer)."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.config.mini_world import MINI_FOLDER
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.records import Record
from prism_megatron.data.render import Renderer
from prism_megatron.evaluation.health import tower_figures
from prism_megatron.game.figures import is_right, judged_groups, rights_of
from prism_megatron.types import PreferenceGroup

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
