"""The warm-start's defaults, recipes and refusals (blind spot: whether a recipe trains well)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.commands.warm_start import parse
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.warm_start import (
    MINI_WARM_START,
    MINI_WARM_START_PAIRS,
    MINI_WARM_START_RECORDS,
    WarmStartConfig,
    check_warm_start,
)
from prism_megatron.errors import ConfigError

MINI = Qwen3VLShape.from_folder(MINI_FOLDER / "policy")


def test_defaults_are_the_papers() -> None:
    """Method notes, 4.2: AdamW 1e-5, decay 0.01, cosine, warm-up 0.1, 128 pairs, clip 1.0, 8192 tokens, one epoch."""
    config = WarmStartConfig()
    optimizer = config.discriminator_optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.schedule, optimizer.clip_grad) == (1e-5, 0.01, "cosine", 1)
    assert [optimizer.lr_at(step, 100) for step in (0, 9, 10)] == pytest.approx([1e-6, 1e-5, 1e-5])
    assert optimizer.lr_at(55, 100) == pytest.approx(0.5e-5), "half of the cosine after a tenth of warm-up"
    assert config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt == 128
    assert config.data.max_prompt_tokens + config.data.max_response_tokens == 8192
    assert (config.steps, config.seed, config.score_regulariser) == (None, 42, 0.0)


def test_load_balance_is_the_papers_spread_over_layers() -> None:
    """Claim: 0.01 · top_k / layers, 7.1e-4 for 28 layers; what is given wins; where nothing can balance it is 0."""
    assert WarmStartConfig().load_balance(28) == pytest.approx(7.1e-4, rel=0.01)
    given = WarmStartConfig(discriminator=DiscriminatorConfig(load_balance=0.25))
    assert given.load_balance(28) == 0.25
    full = WarmStartConfig(discriminator=DiscriminatorConfig(experts_per_tower=2, top_k=2))
    assert full.load_balance(28) == 0.0
    assert WarmStartConfig(discriminator=DiscriminatorConfig(routing="dense")).load_balance(28) == 0.0


def test_the_recipe_fits_what_is_named(tmp_path: Path) -> None:
    assert parse([]) == MINI_WARM_START
    assert parse(["--data", str(tmp_path)]) == replace(
        MINI_WARM_START_RECORDS, data=replace(MINI_WARM_START_RECORDS.data, data=tmp_path)
    )
    assert parse(["--pairs", "x", "--steps", "3"]).steps == 3
    assert parse(["--pairs", "x"]).gate == MINI_WARM_START_PAIRS.gate
    assert parse(["--model", str(tmp_path)]).discriminator_optimizer == WarmStartConfig().discriminator_optimizer
    (tmp_path / "run.yaml").write_text(json.dumps({"pairs": {"pairs": "x"}, "seed": 7}))
    config = parse(["--config", str(tmp_path / "run.yaml"), "--min-accuracy", "0.9"])
    assert (config.pairs.pairs, config.seed, config.gate.min_accuracy, config.steps) == (Path("x"), 7, 0.9, None)
    assert not parse(["--no-strict-format"]).data.strict_format


def test_the_mini_recipes_pass_their_own_checks(tmp_path: Path) -> None:
    check_warm_start(MINI_WARM_START, MINI, world_size=2)
    check_warm_start(parse(["--data", str(tmp_path)]), MINI, world_size=1)
    (tmp_path / "p.jsonl").write_text("")
    check_warm_start(parse(["--pairs", str(tmp_path / "p.jsonl")]), MINI, world_size=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-auc", "1.5"], "--min-auc 1.5 must be at least 0 and at most 1"),
        (["--min-accuracy", "nan"], "--min-accuracy nan must be"),
        (["--gate-rollouts", "0"], "--gate-rollouts 0 must be at least 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--steps", "None"], "scenes have no end: say how many --steps"),
        (["--load-balance", "-1"], "--load-balance -1 must be"),
        (["--discriminator", "FOLDER", "--router-std", "0.1"], "--router-std is for a discriminator made anew"),
        (["--routing", "dense", "--upcycle-noise", "0.1"], "--upcycle-noise is for experts"),
        (["--score-regulariser", "-1"], "--score-regulariser -1 must be"),
        (["--discriminator.warmup-ratio", "2"], "--discriminator.warmup-ratio 2 must be"),
        (["--tp", "3"], "--tp 3"),
        (["--logprob-gap-alarm", "0.1"], "--logprob-gap-alarm compares with a policy that trains"),
        (["--rollout-probe-every", "3"], "--rollout-probe-every compares with a policy that trains"),
        (["--fp32-head"], "--fp32-head is for a policy that trains"),
        (["--freeze-policy-vision"], "--freeze-policy-vision is for a policy that trains"),
        (["--pairs", "FILE", "--temperature", "0.5"], "--temperature is for sampling"),
        (["--pairs", "FILE", "--rollouts-per-prompt", "4"], "--rollouts-per-prompt is for sampling"),
        (["--pairs", "FILE", "--rollout-embedded-ranks", "1"], "--rollout-embedded-ranks is for sampling"),
        (["--write-pairs", "FILE"], "p.jsonl exists; remove it"),
        (["--format-sft", "3"], "--format-sft trains on records"),
        (["--pairs", "nowhere.jsonl"], "--pairs nowhere.jsonl is not a file"),
        (["--pairs", "FILE", "--data", "FOLDER"], "leave --data out"),
        (["--pairs", "FILE", "--prompts", "FILE"], "--prompts chooses among records or scenes"),
        (["--prompts", "nowhere.jsonl"], "--prompts nowhere.jsonl is no file"),
        (["--pairs", "FILE", "--write-pairs", "x"], "--write-pairs writes what was sampled"),
        (["--pairs", "FILE", "--min-auc", "0.8"], "--min-auc needs answers that are known to be right or wrong"),
    ],
)
def test_what_cannot_work_is_refused_by_flag(flags: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    places = {"FILE": str(tmp_path / "p.jsonl"), "FOLDER": str(tmp_path)}
    with pytest.raises(ConfigError) as error:
        check_warm_start(parse([places.get(flag, flag) for flag in flags]), MINI, world_size=2)
    assert message in str(error.value)
