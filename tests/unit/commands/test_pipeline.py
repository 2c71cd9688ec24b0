"""``prism-pipeline`` with the tools of users: the shipped files can be played, and what is refused leaves nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from prism_megatron.commands.pipeline import main, parse, tools_of_users
from prism_megatron.config.experiments.mini import mini_align
from prism_megatron.config.experiments.mini_rlvr import mini_rlvr
from prism_megatron.config.pipeline.file import EVALUATE, read_pipeline
from prism_megatron.config.pipeline.flags import BUILT_IN, PipelineConfig
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.exam import ExamConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.errors import ConfigError
from prism_megatron.pipeline.plan import Plan, check_all, plan_of
from prism_megatron.pipeline.state import STATE
from prism_megatron.pipeline.tools import value_at
from tests.conftest import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "examples").glob("pipeline/*.yaml")) + sorted(
    (REPOSITORY / "examples").glob("single_node_*/pipeline.yaml")
)


def planned(path: Path, output: Path, **flags: object) -> Plan:
    tools = tools_of_users()
    file = read_pipeline(path, tools=[name for name in tools if name != EVALUATE])
    return plan_of(file, dataclasses.replace(PipelineConfig(), **flags), tools, output)  # type: ignore[arg-type]


def test_the_built_in_pipeline_has_five_stages_over_the_mini_s_recipes(tmp_path: Path) -> None:
    """Claim: a stage that starts from an earlier one has the recipe of its world, as its own command would."""
    plan = planned(BUILT_IN, tmp_path)
    check_all(plan)
    steps = {step.key: step for step in plan.steps}
    assert [key for key in steps if key.startswith("stages/")] == [
        f"stages/{name}" for name in ("sft", "warm_start", "align", "select", "rlvr")
    ]
    assert len(steps) == 5 + 4
    align: AlignConfig = steps["stages/align"].config
    rlvr: RLVRConfig = steps["stages/rlvr"].config
    world = align.model.mini
    assert align.policy == mini_align(world, records=False).policy
    assert rlvr.objective == mini_rlvr("grpo", mini=world, records=False).objective
    assert {value_at(step.config, ("mini",)) or step.config.model.mini for step in plan.steps} == {world}


def test_another_algorithm_brings_its_own_defaults(tmp_path: Path) -> None:
    plan = planned(BUILT_IN, tmp_path, algo="prism-gspo")
    (rlvr,) = [step.config for step in plan.steps if step.key == "stages/rlvr"]
    assert rlvr.objective == mini_rlvr("prism-gspo", mini=rlvr.model.mini, records=False).objective


def test_the_baseline_takes_over_the_steps_of_alignment(tmp_path: Path) -> None:
    whole = {step.key: step.config for step in planned(BUILT_IN, tmp_path).steps}
    plan = planned(BUILT_IN, tmp_path, skip=("align",))
    check_all(plan)
    steps = {step.key: step.config for step in plan.steps}
    assert plan.skipped == ["warm_start", "align"]
    assert steps["stages/rlvr"].steps == whole["stages/rlvr"].steps + whole["stages/align"].steps
    assert steps["stages/rlvr"].model.model == str(tmp_path / "stages" / "sft")


def test_alignment_may_ask_held_out_prompts_in_its_section(tmp_path: Path) -> None:
    """Claim: like any flag of it; what nothing would use is refused by the stage's name before anything is played."""
    path = tmp_path / "own.yaml"
    stage = "stages:\n  a: {tool: align, model: {mini: drift}, exam: {EXAM}}\nevaluate: {scenes: 4, mini: drift}\n"
    path.write_text(stage.replace("EXAM", "eval_prompts: 8, eval_every: 5"))
    plan = planned(path, tmp_path / "run")
    check_all(plan)
    (align,) = [step.config for step in plan.steps if step.key == "stages/a"]
    assert align.exam == ExamConfig(eval_every=5, eval_prompts=8)
    path.write_text(stage.replace("EXAM", "eval_every: 5"))
    with pytest.raises(ConfigError, match="stage a: --eval-every is about answers to held-out prompts"):
        planned(path, tmp_path / "run")


def test_steps_of_an_alignment_are_those_that_update_its_policy() -> None:
    align = tools_of_users()["align"]
    assert align.policy_steps is not None
    game = GameConfig(policy_update_every=2, freeze_policy_steps=(0, 4))
    assert align.policy_steps(AlignConfig(steps=10, game=game)) == 3  # steps 5, 7 and 9 of 0 to 9


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_examples_can_be_planned(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blind spot: what the models' checks say, which download hub ids."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/demonstrations", "data/records", "tabmwp", "puzzlevqa"):
        (tmp_path / name).mkdir(parents=True)
    assert len(planned(path, tmp_path / "run").steps) == 9


def test_references_are_of_fields_that_the_tools_have() -> None:
    """Claim: no tool has a key that the pipeline takes for itself, and every way leads to a field."""
    for tool in tools_of_users().values():
        fresh = tool.fresh()
        names = {field.name for field in dataclasses.fields(fresh)}
        assert not names & {"tool", "launcher"}
        for way in (*tool.inputs, *tool.chosen_by):
            inner = fresh
            for name in way:
                assert hasattr(inner, name), (tool.name, way)
                inner = getattr(inner, name)


def test_what_is_refused_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.yaml"
    path.write_text("stages:\n  a: {tool: sft, parallel: {tp: 3}, steps: 1}\n")
    for flags in ([], ["--output", str(tmp_path / "run")]):
        assert main(["--config", str(path), *flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: stage a: --tp 3") and said.count("\n") == 1
    assert not (tmp_path / "run").exists() and list((tmp_path / "runs").iterdir()) == []


def test_an_earlier_pipeline_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / STATE).write_text("{}")
    assert main(["--output", str(tmp_path)]) == 2
    assert "holds an earlier pipeline; go on with it by --resume auto" in capsys.readouterr().err


def test_resume_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="--resume auto goes on with what is in --output"):
        parse(["--resume", "auto"])
    assert parse(["--skip", "align", "--from", "sft"]).from_ == "sft"
