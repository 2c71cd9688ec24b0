"""From a file to steps: what is refused, with its line, and what skipping does. Nothing is played here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism_megatron.errors import ConfigError
from prism_megatron.pipeline.plan import Step, check_all
from prism_megatron.pipeline.tools import value_at
from tests.unit.pipeline.fakes import STEPS, Home

MODEL, PROMPTS = ("model", "model"), ("prompts",)


def steps(home: Home, **flags: Any) -> dict[str, Step]:
    return {step.key: step for step in home.plan(**flags).steps}


def refused(text: str, tmp_path: Path, **flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_all(Home(tmp_path, text).plan(**flags))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("stagse: {}", 1, "unknown key 'stagse'; did you mean stages?"),
        ("launcher: []", 1, "stages must hold named stages"),
        ("stages: []", 1, "stages must hold named stages"),
        ("stages:\n  a: 3", 2, "a must hold keys with values"),
        ("stages:\n  a: {steps: 3}", 2, "stage a has no tool; write one of train, warm, choose"),
        ("stages:\n  a:\n    tool: trian", 3, "no tool 'trian' for stages; did you mean train"),
        ("stages:\n  a: {tool: evaluate}", 2, "no tool 'evaluate'"),
        ("stages:\n  base: {tool: train}", 2, "'base' cannot be a stage's name"),
        ("stages:\n  ../a: {tool: train}", 2, "cannot be a stage's name"),
        ("stages:\n  a:\n    tool: train\n    stesp: 3", 4, "unknown key 'stesp'; did you mean steps?"),
        ("stages:\n  a:\n    tool: train\n    model: {modle: x}", 4, "unknown key 'model.modle'"),
        ("stages:\n  a:\n    tool: train\n    steps: three", 4, "steps must be int, not 'three'"),
        ("stages:\n  a:\n    tool: train\n    launcher: srun", 4, "launcher must be a list of words"),
        ("stages:\n  a:\n    tool: train\n    launcher: [n, 8]", 4, "put numbers in quotes"),
        ("stages:\n  a:\n    tool: train\n    checkpoint:\n      output: x", 5, "leave checkpoint.output out"),
        ("stages:\n  a:\n    tool: train\n    run: {resume: auto}", 4, "leave run.resume out"),
        ("stages:\n  a: {tool: train}\nevaluate:\n  scenes: 1\n  output: x", 5, "leave output out"),
        ("stages:\n  a: {tool: train}\nevaluate:\n  scenes: 1\n  model: x", 5, "leave model out"),
        ("stages:\n  a: {tool: train}\nevaluate: 3", 3, "evaluate must hold keys"),
        ("stages:\n  a: {tool: train}\nevaluate: {}", 3, "name what to ask"),
        ("stages:\n  a: {tool: choose}\nevaluate: {scenes: 1}", 3, "no stage trains a policy"),
    ],
)  # fmt: skip
def test_what_is_no_pipeline_is_refused_with_its_line(text: str, line: int, said: str, tmp_path: Path) -> None:
    message = refused(text, tmp_path)
    assert f"own.yaml, line {line}: " in message and said in message


def of_two(second: str) -> str:
    return f"stages:\n  a: {{tool: train}}\n  w: {{tool: warm}}\n  b:\n{second}\n"


@pytest.mark.parametrize(
    ("second", "line", "said"),
    [
        ('    tool: train\n    model: {model: "@aa"}', 6, "'@aa' is no stage; did you mean @a?"),
        ('    tool: train\n    model:\n      model: "@c"', 7, "'@c' is no stage; did you mean @a?"),
        ('    tool: train\n    model: {model: "@b"}', 6, "'@b' is no stage before this one"),
        ('    tool: train\n    model: {model: "@w"}', 6, "a policy is wanted, and stage w (warm) makes discriminator"),
        ('    tool: train\n    prompts: "@a/chosen.jsonl"', 6, "a prompts is wanted"),
        ('    tool: train\n    prompts: "@d/chosen.jsonl"', 6, "none before makes a prompts"),
        ('    tool: train\n    model: {model: "@a/hf"}', 6, "'@a/hf' is no policy; write @a"),
    ],
)
def test_names_of_what_no_earlier_stage_makes_are_refused(second: str, line: int, said: str, tmp_path: Path) -> None:
    message = refused(of_two(second), tmp_path)
    assert f"own.yaml, line {line}: " in message and said in message


def test_a_later_stage_is_told_from_none(tmp_path: Path) -> None:
    text = 'stages:\n  b:\n    tool: train\n    model: {model: "@a"}\n  a: {tool: train}\n'
    assert "line 4: '@a' is no stage before this one" in refused(text, tmp_path)


def test_bad_values_of_any_stage_are_found_before_one_is_played(tmp_path: Path) -> None:
    """Claim: what a tool's own checks refuse names the stage, though it comes last."""
    assert "stage reward: --lr must be above 0" in refused(STEPS.replace("steps: 7", "lr: -1"), tmp_path)
    absent = STEPS.replace("tool: train\n    steps: 3", "tool: train\n    model: {model: /absent}")
    assert refused(absent, tmp_path).endswith("stage teach: /absent is not there")


def test_what_is_not_there_yet_is_checked_by_what_it_is_made_from(tmp_path: Path) -> None:
    """Claim: the checks of a stage see a model of the right shape: the one that its chain begins with."""
    (tmp_path / "own").mkdir()
    text = STEPS.replace("tool: train\n    steps: 3", f"tool: train\n    model: {{model: {tmp_path / 'own'}}}")
    found = steps(Home(tmp_path, text))
    for key in ("stages/teach", "stages/judge", "stages/play", "stages/reward"):
        assert value_at(found[key].checked, MODEL) == str(tmp_path / "own")
    assert value_at(found["stages/choose"].checked, ("model",)) == str(tmp_path / "own")
    assert value_at(found["stages/reward"].config, MODEL) == str(tmp_path / "run" / "stages" / "play")
    assert value_at(found["stages/reward"].checked, PROMPTS) is None
    assert value_at(found["stages/play"].checked, ("discriminator", "discriminator")) is None
    assert value_at(found["evaluations/base"].config, ("model",)) == str(tmp_path / "own")


def test_flags_stand_over_every_stage(tmp_path: Path) -> None:
    found = steps(Home(tmp_path), seed=9, algo="gspo")
    assert {step.config.seed for key, step in found.items() if key.startswith("stages")} == {9}
    assert found["stages/reward"].config.algo == "gspo"
    assert {step.config.seed for key, step in found.items() if key.startswith("evaluations")} == {42}


def test_launchers(tmp_path: Path) -> None:
    text = STEPS.replace("tool: warm", "tool: warm\n    launcher: []") + 'launcher: [torchrun, "-n", "8"]\n'
    found = steps(Home(tmp_path, text))
    assert found["stages/judge"].launcher == ()
    assert {step.launcher for key, step in found.items() if key != "stages/judge"} == {("torchrun", "-n", "8")}


def test_a_skipped_stage_hands_on_what_it_would_have_started_from(tmp_path: Path) -> None:
    """Claim: its steps go to the next policy stage alone, its discriminator's stage is skipped with it."""
    plan = Home(tmp_path).plan(skip=("play",))
    found = {step.key: step for step in plan.steps}
    assert plan.skipped == ["judge", "play"]
    teach = str(tmp_path / "run" / "stages" / "teach")
    assert value_at(found["stages/choose"].config, ("model",)) == teach
    assert value_at(found["stages/reward"].config, MODEL) == teach
    assert (found["stages/reward"].config.steps, found["stages/reward"].added_steps) == (12, 5)
    assert (found["stages/teach"].config.steps, found["stages/teach"].added_steps) == (3, 0)
    assert "evaluations/play" not in found


def test_skipping_the_first_stage_starts_from_the_mini(tmp_path: Path) -> None:
    found = steps(Home(tmp_path), skip=("teach",))
    assert value_at(found["stages/play"].config, MODEL) == str(tmp_path / "mini")
    assert (found["stages/play"].config.steps, found["stages/reward"].config.steps) == (8, 7)
    assert value_at(found["evaluations/base"].config, ("model",)) == str(tmp_path / "mini")


def test_steps_of_two_skipped_stages_add_up(tmp_path: Path) -> None:
    found = steps(Home(tmp_path), skip=("teach", "play"))
    assert found["stages/reward"].config.steps == 3 + 5 + 7


def test_a_policy_is_not_skipped_with_its_users(tmp_path: Path) -> None:
    """Claim: only what makes no policy is: a policy is a result of its own."""
    assert Home(tmp_path).plan(skip=("reward",)).skipped == ["choose", "reward"]


def test_without_its_selection_all_prompts_are_used(tmp_path: Path) -> None:
    found = steps(Home(tmp_path), skip=("choose",))
    assert found["stages/reward"].config.prompts is None


def test_steps_that_are_not_known_cannot_be_added(tmp_path: Path) -> None:
    text = STEPS.replace("steps: 5", "steps: null")
    assert "how many stage play has is not said; give it steps" in refused(text, tmp_path, skip=("play",))
    refused_too = refused(STEPS.replace("steps: 7", "steps: null"), tmp_path, skip=("play",))
    assert "how many stage reward has is not said" in refused_too


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"skip": ("plaay",)}, "--skip plaay: .*did you mean play"),
        ({"from_": "x"}, "--from x: "),
        ({"until": "x"}, "--until x: "),
        ({"from_": "play", "until": "judge"}, "--from play comes after --until judge"),
    ],
)
def test_flags_name_stages(flags: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        Home(tmp_path).plan(**flags)
