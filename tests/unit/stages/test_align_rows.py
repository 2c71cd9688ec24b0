"""What a step reports, by hand, and when the gap between rollout and trainer raises the alarm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.provider import StepResult
from prism_megatron.evaluation.sample import png_url
from prism_megatron.evaluation.scenes import SceneJudgement, item_accuracy
from prism_megatron.game.controls import Decision
from prism_megatron.game.credit import credit_groups
from prism_megatron.game.judge import Judgement
from prism_megatron.game.samples import game_samples
from prism_megatron.game.scoring_plan import TrunkCost
from prism_megatron.observability.catalogue import describe
from prism_megatron.sampling.queue import SampledStep, Staleness
from prism_megatron.stages.align.rows import AlignStep, policy_version, step_row, truth_row
from prism_megatron.training.figures import correction_row, gap_alarms, gap_row, importance_row
from prism_megatron.training.policy_update import PolicyUpdate
from tests.unit.game.tiny_game import group, invalid, response, rollout


def sums(*, text: float, image: float, image_tokens: int = 30) -> dict[str, float]:
    """Ten text tokens; ``text`` and ``image`` are the summed gaps."""
    return {
        "gap/text/tokens": 10.0,
        "gap/text/sum": text,
        "gap/text/kl": 1.0,
        "gap/text/max": text,
        "gap/image/tokens": float(image_tokens),
        "gap/image/sum": image,
        "gap/image/kl": 3.0,
        "gap/image/max": image,
    }


def test_text_and_image_prompts_are_apart() -> None:
    row = gap_row(sums(text=0.5, image=6.0))
    assert row["logprob_gap"] == pytest.approx(6.5 / 40)
    assert row["logprob_gap/text/mean"] == pytest.approx(0.05)
    assert row["logprob_gap/image/mean"] == pytest.approx(0.2)
    assert row["logprob_gap/image/kl"] == pytest.approx(0.1)
    assert (row["logprob_gap/text/max"], row["logprob_gap/image/max"]) == (0.5, 6.0)


def test_the_alarm_names_the_prompts_that_are_off() -> None:
    """Stale image weights show in image prompts alone, however many text tokens dilute the mean of the step."""
    row = {"step": 7} | gap_row(sums(text=0.1, image=6.0))
    (line,) = gap_alarms(row, 0.05)
    assert "step 8" in line
    assert "0.2 a token for image prompts" in line
    assert "--logprob-gap-alarm 0.05" in line
    assert gap_alarms(row, 0.3) == []
    assert gap_alarms({"step": 7} | gap_row(sums(text=2.5, image=0.0)), 0.25) == [], "only above the threshold"


def test_a_gap_that_is_no_number_raises_the_alarm_and_missing_prompts_do_not() -> None:
    assert len(gap_alarms({"step": 0} | gap_row(sums(text=math.nan, image=0.0)), 0.05)) == 1
    row = gap_row(sums(text=0.1, image=0.0, image_tokens=0))
    assert row["logprob_gap/image/mean"] is row["logprob_gap/image/max"] is row["logprob_gap/image/kl"] is None
    assert gap_alarms({"step": 0} | row, 0.05) == []


def test_importance_weights_are_shares_of_the_tokens() -> None:
    """Weights 1, 1, 1 and 3: three quarters are within the bound, and they count as 36/12 = 3 tokens of 4."""
    sums = {
        "importance/tokens": 4.0,
        "importance/sum": 6.0,
        "importance/squares": 12.0,
        "importance/truncated": 1.0,
        "importance/max": 3.0,
        "importance/clamped": 1.0,
    }
    assert importance_row(sums) == {
        "importance/mean": 1.5,
        "importance/max": 3.0,
        "importance/truncated_share": 0.25,
        "importance/clamped_tokens": 1,
        "importance/effective_share": 0.75,
    }


def step_of(verdict: Any, policy_result: StepResult | None) -> AlignStep:
    """Four rollouts of three prompts, one cut and one without tags; one replayed; five copies of references."""
    groups = [
        group(response([8], [9]), rollout([8], [9]), invalid(10, 11, 12, 13)),
        group(response([8]), rollout([8], [9])),
        group(response([8]), replace(invalid(10), finish_reason="stop")),
    ]
    scores: dict[tuple[int, int, int | None], float] = {
        (0, 0, None): 1.0,
        (0, 1, None): 1.5,
        (1, 0, None): 1.25,
        (2, 0, None): 0.0,
    }
    scores |= {(0, 0, 0): 2.0, (0, 1, 0): 12.0, (1, 0, 0): 0.5}
    results = [StepResult(1.5, 0.1, True), StepResult(2.5, 0.2, True)]
    judgement = Judgement(scores, {"discriminator_loss": 0.25}, results, TrunkCost(100, 60, 250, 5, 3))
    credited = credit_groups(groups, judgement, GameConfig(), seed=0, step=6, version=5)
    policy_sums = sums(text=1.0, image=2.0) | {
        f"importance/{name}": 4.0 for name in ("tokens", "sum", "squares", "truncated", "clamped", "max")
    }
    sampled = SampledStep([Example(one.prompt, one.reference) for one in groups], groups, 4, Staleness(0.5, 2, 0.25))
    update, decision = PolicyUpdate(policy_sums, policy_result), Decision(2, update_policy=True)
    return AlignStep(6, sampled, groups[:1], decision, judgement, credited, update, verdict)


def test_a_row_counts_what_the_step_was_made_of() -> None:
    row = step_row(step_of("go on", StepResult(3.5, 0.3, True)), Renderer.from_folder(MINI_FOLDER / "policy"))
    expected = {
        "step": 6, "policy_version": 7, "sampled_version": 0, "discriminator_version": 5, "rollouts": 4,
        "valid_rollouts": 2, "valid_share": 0.5, "replayed_rollouts": 1, "truncated_rollouts": 1,
        "response_tokens": 3 + 4 + 3 + 1, "unrewarded_step": 0, "discriminator_updates": 2, "rolled_back": 0,
        "settled": 0, "staleness/mean": 0.5, "staleness/max": 2, "off_policy_share": 0.25, "all_invalid_groups": 1,
        "one_valid_groups": 2, "flat_rewards": 0, "clipped_scores": 1, "discriminator/trunk_tokens": 100,
        "discriminator/unique_tokens": 60, "discriminator/rollouts_per_reference": (2 + 1) / 5,
        "discriminator_grad_norm": 2.5, "policy_grad_norm": 3.5, "policy_lr": 0.3, "policy_updated": 1,
        "perception/pairs": 2, "reasoning/pairs": 1, "importance/mean": 1.0, "discriminator_loss": 0.25,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert not [name for name in row if name.startswith(("gap/", "truth/"))]
    for verdict, flags in (("roll back", (1, 0)), ("stop", (0, 1))):
        row = step_row(step_of(verdict, None), Renderer.from_folder(MINI_FOLDER / "policy"))
        assert (row["rolled_back"], row["settled"], row["policy_updated"]) == (*flags, None)


@pytest.mark.parametrize(
    ("verdict", "result", "version"),
    [
        ("go on", StepResult(1.0, 0.1, True), 7),
        ("go on", StepResult(math.inf, 0.1, False), 4),
        ("go on", None, 4),
        ("roll back", None, 7),
        ("roll back", StepResult(math.inf, 0.1, False), 7),
    ],
)
def test_the_policys_version_rises_with_every_change_of_it(
    verdict: Any, result: StepResult | None, version: int
) -> None:
    """Going back is a change as well: what is sampled next is of another policy."""
    assert policy_version(step_of(verdict, result)) == version


def test_item_accuracy_falls_by_what_is_missing_and_by_what_is_too_much() -> None:
    def judged(*, written: int, right: int, there: int) -> float:
        return item_accuracy(SceneJudgement(True, written, right, there, False, 1, 1, True, True))

    assert judged(written=4, right=2, there=3) == 0.5
    assert judged(written=2, right=2, there=4) == 0.5
    assert judged(written=3, right=3, there=3) == 1.0


def test_what_is_known_of_scenes_is_a_mean_over_responses() -> None:
    """Two responses: one right in all but an item too much, the other in its item alone."""
    one = SceneJudgement(True, 4, 3, 3, False, 2, 2, True, True)
    other = SceneJudgement(True, 1, 1, 2, False, 4, 1, False, False)
    assert truth_row([one, other]) == {
        "truth/responses": 2,
        "truth/item_accuracy": (3 / 4 + 1 / 2) / 2,
        "truth/caption_exact": 0.0,
        "truth/step_validity": (1.0 + 1 / 4) / 2,
        "truth/reasoning_exact": 0.5,
        "truth/answer_right": 0.5,
        "truth/items": 2.5,
    }
    assert truth_row([]) == {}


def test_samples_show_the_first_rollout_of_each_group_with_its_own_scores() -> None:
    """As many groups as asked for; None where a tower did not judge."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    step = step_of("go on", None)
    scenes = SceneSource(renderer, split="heldout", seed=0, batch_size=3).batch(0)
    samples = game_samples(scenes, step.groups, step.judgement, renderer, count=2)
    assert [sample.scores for sample in samples] == [
        {"perception": 2.0, "reasoning": 12.0},
        {"perception": 0.5, "reasoning": None},
    ]
    assert [sample.reference_scores for sample in samples] == [
        {"perception": 1.0, "reasoning": 1.5},
        {"perception": 1.25, "reasoning": None},
    ]
    assert [sample.response for sample in samples] == [renderer.decode((8, 9, 2))] * 2
    shown = [sample.images for sample in samples]
    assert shown == [[png_url(one.scene.image())] for one in scenes[:2] if one.scene is not None]
    assert [sample.images for sample in game_samples([], step.groups, step.judgement, renderer, count=1)] == [[]]


def test_a_correction_s_figures_are_shares_of_what_it_kept() -> None:
    """By hand; each has a line in the catalogue, and without a correction there is none."""
    sums = {
        "correction/kept_tokens": 8.0,
        "correction/rejected_tokens": 3.0,
        "correction/vetoed_rollouts": 1.0,
        "correction/truncated_tokens": 2.0,
        "correction/weight_sum": 10.0,
        "correction/effective_share": 0.9,
    }
    row = correction_row(sums)
    assert row == {
        "correction/kept_tokens": 8,
        "correction/rejected_tokens": 3,
        "correction/vetoed_rollouts": 1,
        "correction/truncated_share": 0.25,
        "correction/mean_weight": 1.25,
        "correction/effective_share": 0.9,
    }
    assert all(describe(name).meaning for name in row)
    assert correction_row({}) == {}
    none_kept = {name: 0.0 for name in sums if name != "correction/effective_share"}
    assert correction_row(none_kept)["correction/mean_weight"] is None
    assert correction_row(none_kept)["correction/effective_share"] is None
