"""Why a step taught nothing: the rule that is broken most, how often, and an answer that breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.render import Renderer
from prism_megatron.engine.provider import StepResult
from prism_megatron.game.controls import Decision
from prism_megatron.game.unlearned import ALL_LEFT_OUT, SCORES_NOT_FINITE, why_none_is_valid
from prism_megatron.stages.align.rows import who_learned
from prism_megatron.training.figures import NOT_FINITE
from prism_megatron.types import Rollout
from tests.unit.game.tiny_game import group, invalid, response, rollout
from tests.unit.stages.test_align_rows import step_of


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.from_folder(MINI_FOLDER / "policy")


def broken(problem: str, text: str, renderer: Renderer) -> Rollout:
    one = invalid(*renderer.tokenizer.encode(text))
    return replace(one, segments=replace(one.segments, problem=problem))


def test_one_valid_answer_is_enough(renderer: Renderer) -> None:
    groups = [group(response([8], [9]), invalid(10), rollout([8], [9]))]
    assert why_none_is_valid(groups, renderer) is None


def test_rules_are_counted_and_the_commonest_is_shown(renderer: Renderer) -> None:
    groups = [
        group(response([8], [9]), broken("no end", "first", renderer), broken("no caption", "<think>", renderer)),
        group(response([8], [9]), broken("no caption", "second", renderer)),
    ]
    why = why_none_is_valid(groups, renderer)
    assert why == ("none of 3 answers keeps the format (2 times: no caption, 1 times: no end); one of them: '<think>'")


def test_what_the_model_wrote_is_shown_harmlessly_and_in_part(renderer: Renderer) -> None:
    why = why_none_is_valid([group(response([8]), broken("x", "\x1b[2J\n" + "a" * 500, renderer))], renderer)
    assert why is not None and "\x1b" not in why and "\n" not in why
    assert "'\\x1b[2J\\n" in why and why.endswith("a'…") and len(why) < 300


def test_no_answer_at_all(renderer: Renderer) -> None:
    assert why_none_is_valid([group(response([8]))], renderer) == "there was no answer"


UPDATED, DROPPED = StepResult(1.0, 0.1, True), StepResult(float("inf"), 0.1, False)


def learned(renderer: Renderer, policy: StepResult | None, **changes: Any) -> tuple[list[str], dict[str, str]]:
    step = replace(step_of("go on", policy), **changes)
    roles, idle = who_learned(step, renderer)
    return list(roles), idle


def test_players_that_were_updated_learned(renderer: Renderer) -> None:
    assert learned(renderer, UPDATED) == (["policy", "discriminator"], {})


def test_a_dropped_update_is_told_from_a_rest(renderer: Renderer) -> None:
    assert learned(renderer, DROPPED) == (["discriminator"], {"policy": NOT_FINITE})
    assert learned(renderer, None, decision=Decision(2, update_policy=False)) == (["discriminator"], {})
    judgement = step_of("go on", UPDATED).judgement
    dropped = replace(judgement, results=[DROPPED, DROPPED])
    assert learned(renderer, UPDATED, judgement=dropped) == (["policy"], {"discriminator": NOT_FINITE})
    frozen = Decision(0, update_policy=True)
    assert learned(renderer, UPDATED, judgement=replace(judgement, results=[]), decision=frozen) == (["policy"], {})


def test_scores_that_are_not_finite_are_the_reason(renderer: Renderer) -> None:
    judgement = replace(step_of("go on", None).judgement, scores={(0, 0, 0): float("nan")})
    assert learned(renderer, None, judgement=judgement)[1] == {"policy": SCORES_NOT_FINITE}


def test_a_correction_that_keeps_nothing_is_the_reason(renderer: Renderer) -> None:
    step = step_of("go on", None)
    for kept, reason in ((0.0, ALL_LEFT_OUT), (1.0, NOT_FINITE)):
        update = replace(step.policy, sums={**step.policy.sums, "correction/kept_tokens": kept})
        assert who_learned(replace(step, policy=update), renderer)[1] == {"policy": reason}


def test_a_step_that_was_rolled_back_counts_for_nobody(renderer: Renderer) -> None:
    assert learned(renderer, UPDATED, verdict="roll back") == ([], {})
