"""Whole steps of the game on two data-parallel ranks, with the mini's models and scripted rollouts.

Weights, masters and moments are compared by hash, so "not updated" means not a bit of them. Blind spot: other layouts,
which ``tests/parity/test_layouts.py`` compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.validate import check_align
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.teachers import write
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.stages.align.build import align_on
from prism_megatron.testing import GlooWorld
from tests.integration.game_ranks import PROMPTS, ROLLOUTS, SEED, Row, play
from tests.mini_experts import write_mini_with_experts

EXAM_PROMPTS = 5
TOWER_FIGURES = (
    "accuracy",
    "reward_gap",
    "rollout_score",
    "rollout_std",
    "auc",
    "length_correlation",
)
TOWER_COUNTS = ("pairs", "auc_pairs", "length_correlation_count")


class Played(NamedTuple):
    """Rows and digests of rank 0, and by step whether (policy, discriminator) changed on any rank."""

    rows: list[Row]
    digests: list[tuple[str, str]]
    moved: list[tuple[bool, ...]]


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(2) as world:
        yield world


@pytest.fixture
def game(gloo: GlooWorld, tmp_path: Path) -> Callable[..., Played]:
    """Plays on both ranks, which must report the same rows; gives rank 0's."""

    def run(
        rules: GameConfig,
        valid_steps: str,
        captions_only: Mapping[int, Sequence[int]] | None = None,
        exam_prompts: int = 0,
    ) -> Played:
        (rows, digests), (others, other_digests) = gloo.run(
            partial(play, exam_prompts=exam_prompts), rules, valid_steps, captions_only or {}, tmp_path / "saved"
        )
        assert others == rows, "ranks disagree"
        moved = [
            tuple(any(pair[0][role] != pair[1][role] for pair in pairs) for role in (0, 1))
            for pairs in zip(pairwise(digests), pairwise(other_digests), strict=True)
        ]
        return Played(rows, digests, moved)

    return run


def finite(row: Row) -> bool:
    return all(value is None or math.isfinite(value) for value in row.values())


def test_steps_without_a_valid_rollout_train_nobody_and_invent_no_number(game: Callable[..., Played]) -> None:
    """Claim: no NaN, no made-up figure, no byte of either player changed, and the game goes on afterwards."""
    played = game(GameConfig(), "xxv")
    assert played.moved == [(False, False), (False, False), (True, True)]
    for row in played.rows[:2]:
        assert finite(row)
        assert row["valid_rollouts"] == 0 == row["valid_share"]
        assert row["all_invalid_groups"] == PROMPTS
        assert row["unrewarded_step"] == 1
        assert row["policy_updated"] is row["discriminator_updated"] is None
        assert row["policy_loss"] == row["discriminator_loss"] == 0.0
        for tower in ("perception", "reasoning"):
            assert all(row[f"{tower}/{name}"] is None for name in TOWER_FIGURES), row
            assert all(row[f"{tower}/{name}"] == 0 for name in TOWER_COUNTS)
        assert (row["tower_agreement"], row["tower_agreement_groups"]) == (None, 0)
    trained = played.rows[2]
    assert finite(trained)
    assert trained["perception/pairs"] == trained["reasoning/pairs"] == PROMPTS * ROLLOUTS
    assert trained["policy_updated"] == trained["discriminator_updated"] == 1


def test_released_punishment_of_groups_without_a_valid_rollout(game: Callable[..., Played]) -> None:
    """``--all-invalid-group release``: the policy is pushed off such answers, the discriminator learns nothing."""
    played = game(GameConfig(all_invalid_group="release"), "x")
    assert played.rows[0]["policy_updated"] == 1
    assert played.rows[0]["policy_loss"] == pytest.approx(1.5, abs=1e-5)
    assert played.moved == [(True, False)]


def test_references_without_reasoning_are_judged_by_perception_alone(game: Callable[..., Played]) -> None:
    """Pairs, advantages and gradients come from perception; reasoning has pairs of the other groups, or none at all."""
    played = game(GameConfig(), "vv", {0: [0, 1], 1: [1]})
    alone, mixed = played.rows
    assert finite(alone)
    assert finite(mixed)
    for row in (alone, mixed):
        assert row["valid_rollouts"] == row["perception/pairs"] == PROMPTS * ROLLOUTS
        assert row["policy_grad_norm"] > 0
        assert row["discriminator_grad_norm"] > 0
    assert played.moved == [(True, True)] * 2
    assert all(alone[f"reasoning/{name}"] is None for name in TOWER_FIGURES)
    assert all(alone[f"reasoning/{name}"] == 0 for name in TOWER_COUNTS)
    assert mixed["reasoning/pairs"] == ROLLOUTS
    assert mixed["reasoning/accuracy"] is not None


def test_players_move_as_the_flags_say(game: Callable[..., Played]) -> None:
    """Two updates of the discriminator a step, frozen in step 1; the policy moves in every second step; replays."""
    rules = GameConfig(discriminator_updates_per_step=2, policy_update_every=2, freeze_discriminator_steps=(1, 2),
                       replay_prompts=3, replay_steps=1)  # fmt: skip
    played = game(rules, "vvvv")
    rows = played.rows
    assert played.moved == [(False, True), (True, False), (False, True), (True, True)]
    assert [row["discriminator_updates"] for row in rows] == [2, 0, 2, 2]
    assert [row["replayed_rollouts"] for row in rows] == [0] + [PROMPTS * ROLLOUTS] * 3
    assert [row["sampled_version"] for row in rows] == [0, 0, 2, 2]
    assert [row["policy_version"] for row in rows] == [0, 2, 2, 4]
    assert [row["discriminator_version"] for row in rows] == [0, 1, 1, 3]
    assert [row["perception/pairs"] for row in rows] == [PROMPTS * ROLLOUTS] * 4, "figures are of the step's rollouts"


def test_a_collapse_goes_back_to_the_saved_pair(game: Callable[..., Played]) -> None:
    """Claim: after two steps without valid rollouts both players are, to the bit, those saved after step 0.

    Versions go on rising, and the game is played on.
    """
    played = game(GameConfig(rollbacks=1, collapse_steps=2, collapse_valid_share=0.5), "vvxxv")
    rows, digests = played.rows, played.digests
    assert [row["rolled_back"] for row in rows] == [0, 0, 0, 1, 0]
    assert digests[1] != digests[2] == digests[3]
    assert digests[4] == digests[1]
    assert rows[3]["policy_version"] == 4 == rows[4]["sampled_version"] == rows[4]["discriminator_version"]
    assert rows[4]["policy_updated"] == 1


def test_held_out_prompts_are_asked_and_change_nothing(game: Callable[..., Played]) -> None:
    """Claim: in every second step, of a rollback too, and after the last; both ranks have the same figures.

    They are those of the answers that the script has, of which some are right by chance. Weights, moments and all other
    figures are, to the bit, those of a game without.
    """
    rules = GameConfig(rollbacks=1, collapse_steps=2, collapse_valid_share=0.5)
    plain, asked = game(rules, "vvxxv"), game(rules, "vvxxv", exam_prompts=EXAM_PROMPTS)
    own = [{name: value for name, value in row.items() if name.startswith("eval/")} for row in asked.rows]
    assert [bool(figures) for figures in own] == [False, True, False, True, True] and asked.rows[3]["rolled_back"] == 1
    right = scripted_rights(EXAM_PROMPTS)
    greedy, sampled = [of_prompt[0] for of_prompt in right], [one for of_prompt in right for one in of_prompt]
    assert 0 < sum(sampled) < len(sampled) == EXAM_PROMPTS * ROLLOUTS
    for figures in (figures for figures in own if figures):
        assert figures["eval/prompts"] == EXAM_PROMPTS and figures["eval/sampled/format"] == 1.0
        assert figures["eval/greedy/accuracy"] == pytest.approx(fmean(greedy), abs=1e-12)
        assert figures["eval/sampled/accuracy"] == pytest.approx(fmean(sampled), abs=1e-12)
        assert figures["eval/sampled/pass"] == pytest.approx(fmean(map(any, right)), abs=1e-12)
    assert asked.digests == plain.digests
    rest = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in asked.rows]
    assert rest == plain.rows


def scripted_rights(prompts: int) -> list[list[bool]]:
    """Which answers of the script to step 0 are right, were they answers to held-out scenes."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    scenes = [one.scene for one in SceneSource(renderer, split="heldout", seed=SEED, batch_size=prompts).batch(0)]
    answering = SceneSource(renderer, split="sft", seed=SEED, batch_size=prompts * ROLLOUTS).batch(0)
    said = [write(one.scene, "sloppy", seed=SEED)[-1] for one in answering if one.scene is not None]
    return [
        [one == scene.answer for one in said[number * ROLLOUTS : (number + 1) * ROLLOUTS]]
        for number, scene in enumerate(scenes)
        if scene is not None
    ]


def test_a_game_that_settles_is_asked_at_its_end(game: Callable[..., Played]) -> None:
    """Claim: the third of six steps ends it, in which nothing is due."""
    rows = game(GameConfig(stop_gap_band=100.0, stop_gap_steps=3), "vvvvvv", exam_prompts=2).rows
    assert [("eval/prompts" in row, row["settled"]) for row in rows] == [(False, 0), (True, 0), (True, 1)]


def test_a_policy_with_experts_plays_against_a_dense_models_discriminator(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: two steps at TP2·EP2 train both players, and the embedded engine samples from the policy that is trained.

    Rollout and trainer log-probs of a token differ by 1e-5 at most, before and after an update. The policy has three
    DeepStack taps and the discriminator two. Experts are exported as they came.
    """
    folder, judge = write_mini_with_experts(tmp_path / "policy"), MINI_FOLDER / "discriminator"
    config = replace(
        MINI_ALIGN,
        parallel=ParallelConfig(tp=2, ep=2),
        model=ModelConfig(str(folder), dtype="fp32"),
        discriminator=DiscriminatorConfig(str(judge)),
        rollout=RolloutConfig(prompts_per_step=PROMPTS, rollouts_per_prompt=ROLLOUTS),
        checkpoint=CheckpointConfig(output=tmp_path / "run"),
        steps=2,
    )
    shapes = [Qwen3VLShape.from_folder(one) for one in (folder, judge)]
    check_align(config, shapes[0], world_size=2, discriminator=shapes[1])
    gloo.run(align_on, config, parallel=config.parallel)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["policy_updated"] for row in rows] == [1, 1]
    for row in rows:
        assert row["perception/pairs"] == row["reasoning/pairs"] == row["valid_rollouts"] > 0
        assert row["discriminator_grad_norm"] > 0
        assert 0 < row["logprob_gap/image/max"] <= 1e-5
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run" / "hf"))
    assert {name: one.shape for name, one in before.items()} == {name: one.shape for name, one in after.items()}
    assert all((before[name] != after[name]).any() for name in before if ".mlp." in name and "visual" not in name)
