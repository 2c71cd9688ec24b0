"""Which answers count as right, and the AUC over a step's groups (blind spot: two ways to say one answer)."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.config.mini_world import MINI_FOLDER
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.records import Record
from prism_megatron.data.render import Renderer
from prism_megatron.stages.truth import group_auc, is_right
from prism_megatron.types import PreferenceGroup


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.from_folder(MINI_FOLDER / "policy")


def test_a_scene_knows_both_towers_and_a_record_its_answer(renderer: Renderer) -> None:
    """Claim: the faithful reference is right in both; of a record only the answer counts, whatever its case."""
    scene = SceneSource(renderer, split="heldout", seed=0, batch_size=1).batch(0)[0]
    right = renderer.decode(scene.reference.token_ids[:-1])
    assert is_right(scene, right, renderer) == (True, True)
    assert is_right(scene, right.replace("- ", "- blue ", 1), renderer) == (False, True)

    record = Record("r", Path("x"), "q", None, "Yes", "s", "c", "set")
    example = Example(scene.prompt, scene.reference, record=record)
    for answer, expected in ((" yes ", True), ("Yes.", False), ("no", False)):
        text = f"<caption>c</caption><think>t</think><answer>{answer}</answer>"
        assert is_right(example, text, renderer) == (None, expected)


def test_auc_compares_inside_groups_and_only_what_is_known(renderer: Renderer) -> None:
    """Claim: by hand, on two groups; perception of records has no pairs and so no value."""
    texts = [f"<caption>c</caption><think>t</think><answer>{answer}</answer>" for answer in ("yes", "no", "no")]
    rollouts = tuple(renderer.written(text, id="x") for text in texts)
    scene = SceneSource(renderer, split="heldout", seed=0, batch_size=1).batch(0)[0]
    record = Record("r", Path("x"), "q", None, "yes", "s", "c", "set")
    example = Example(scene.prompt, renderer.response("c", "t", "yes"), record=record)
    groups = [PreferenceGroup(example.prompt, example.reference, rollouts)] * 2
    scores: dict[tuple[int, int, int | None], float] = {}
    for g, own in enumerate([(2.0, 1.0, 3.0), (-5.0, -6.0, -5.0)]):  # 1 of 2 won; 1 and a tie
        scores |= {(g, tower, r): score for tower in (0, 1) for r, score in enumerate(own)}
    perception, reasoning = group_auc([example, example], groups, scores, renderer)
    assert (perception.value, perception.pairs) == (None, 0)
    assert (reasoning.value, reasoning.pairs) == (2.5 / 4, 4)
