"""The variants are one flag apart, and their table reads figures from the right responses. Blind spot: the runs."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.experiments.effect import EffectConfig
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.variants import VARIANTS, VariantsConfig, variant
from prism_megatron.config.fields import check_fields
from prism_megatron.errors import ConfigError
from prism_megatron.evaluation.proxies import ResponseForm
from prism_megatron.evaluation.scenes import SceneJudgement
from prism_megatron.experiments.variants import BEFORE, compare
from prism_megatron.game.figures import game_row
from prism_megatron.game.judge import Judgement
from prism_megatron.game.scoring_plan import TrunkCost
from prism_megatron.sampling.scene_answers import MODES, Responses, SceneResponse


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields of nested dataclasses by dotted name."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= leaves(value, f"{prefix}{field.name}.") if is_dataclass(value) else {f"{prefix}{field.name}": value}
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_one_field_from_the_defaults(name: str) -> None:
    default, changed_to = leaves(MINI_ALIGN), leaves(variant(name))
    changed = {field for field in default if default[field] != changed_to[field]}
    assert len(changed) == (name != "segment"), changed


def response(*, right: bool, items: int | None) -> SceneResponse:
    judgement = SceneJudgement(
        format_valid=items is not None,
        num_items=items or 0,
        items_right=int(right),
        items_in_scene=1,
        caption_exact=right,
        num_steps=1,
        steps_right=int(right),
        reasoning_exact=right,
        answer_right=right,
    )
    return SceneResponse(judgement, None if items is None else ResponseForm(items, 2, 10 * items))


def responses(*of_scenes: SceneResponse) -> Responses:
    return {mode: list(of_scenes) for mode in MODES}


def test_figures_come_from_the_variant_s_own_responses() -> None:
    """Two scenes, one seed. A response of invalid format counts as wrong, and has no form."""
    runs = {
        BEFORE: [responses(response(right=False, items=1), response(right=True, items=3))],
        **{name: [responses(response(right=True, items=4), response(right=True, items=4))] for name in VARIANTS},
        "dense": [responses(response(right=False, items=None), response(right=False, items=None))],
    }
    judged = game_row([], Judgement({}, {"discriminator_loss": 0.0}, (), TrunkCost(0, 1, 0, 1, 0)), [])
    held_out = {name: {**judged, "reasoning/auc": 0.75} for name in VARIANTS}
    supervision = [ResponseForm(4, 2, 40)]
    comparison = compare(VariantsConfig(output=Path("unused"), scenes=2), runs, supervision, held_out)
    sections = comparison.as_document()["sections"]
    levels, changes, means, spreads, distances = sections.values()
    right = levels["greedy/answer right"]
    assert [right[name]["mean"] for name in (BEFORE, "joint", "dense")] == [0.5, 1.0, 0.0]
    assert changes["T=1/answer right"][BEFORE] is None
    assert changes["T=1/answer right"]["dense"]["mean"] == -0.5
    assert means["T=1/caption items"][BEFORE]["mean"] == 2.0
    assert spreads["T=1/caption items"][BEFORE]["mean"] == 1.0
    assert distances["T=1/caption items"][BEFORE]["mean"] == 2.0
    assert distances["T=1/caption items"]["joint"]["mean"] == 0.0
    assert means["greedy/tokens"]["dense"] is None
    assert comparison.columns["text"] == "--modality text; warm-start AUC perception –, reasoning 0.750"


@pytest.mark.parametrize("name", ["seeds", "steps", "scenes", "data_parallel", "warm_start_steps"])
def test_an_experiment_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} 0 must be at least 1"):
        check_fields(VariantsConfig(Path("unused"), **{name: 0}))
    check_fields(EffectConfig(Path("unused")))
