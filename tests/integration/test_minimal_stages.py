"""Each stage's example in one file does what the stage does, and all of them play in a row.

The example of alignment has its own tests (``test_minimal_example.py``). Blind spot: what the examples leave out, such
as records, dynamic sampling, servers, and layouts but TP1, and TP2 of the row.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from examples.minimal import pipeline
from examples.minimal.evaluate import evaluate
from examples.minimal.rlvr import reinforce
from examples.minimal.sft import fine_tune
from examples.minimal.warm_start import HELD_OUT_ROLLOUTS, NUM_HELD_OUT, warm_up
from prism_megatron.config.check import CheckConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.speed import SpeedConfig
from prism_megatron.config.experiments.mini_rlvr import mini_rlvr
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.exam import NO_EXAM
from prism_megatron.config.stages.sft import MINI_SFT
from prism_megatron.config.stages.warm_start import MINI_WARM_START, GateConfig
from prism_megatron.config.tools.evaluate import EvaluateConfig
from prism_megatron.engine.runtime import World
from prism_megatron.jobs.check_weights import check_weights
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.stages.evaluate.build import evaluate_on
from prism_megatron.stages.rlvr.build import reinforce_on
from prism_megatron.stages.sft.build import fine_tune_on
from prism_megatron.stages.warm_start.build import warm_up_on
from prism_megatron.testing import GlooWorld

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "minimal"
FILES = sorted(FOLDER.glob("*.py"))
STEPS = 2
SCENES = 24
MOST_LINES = 120


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(1) as world:
        yield world


PLAIN_WAYS = SpeedConfig(fuse_weight_gradients="off")
"""What the examples take: summed inside the product, weight gradients would be rounded elsewhere."""


def saved_in(run: Path) -> CheckpointConfig:
    return CheckpointConfig(output=run, save_every=STEPS)


def check_same(rows: Sequence[Mapping[str, Any]], example: Path, run: Path) -> None:
    """All figures of the example's steps are the run's, to the bit, and so are the weights that both have made."""
    expected = read_metrics(run / "metrics.jsonl")
    assert len(rows) == len(expected) == STEPS
    for row, wanted in zip(rows, expected, strict=True):
        assert row and row == {name: wanted[name] for name in row}
    assert check_weights(CheckConfig(str(example / "hf"), str(run / "hf"))).equal


def test_fine_tuning_is_the_stage(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: equal to the last bit are all figures of the example's steps and the policy's weights after them."""
    example, run = tmp_path / "example", tmp_path / "run"
    (rows,) = gloo.run(partial(fine_tune, steps=STEPS, output=example))
    config = replace(MINI_SFT, steps=STEPS, drift_scenes=0, checkpoint=saved_in(run), speed=PLAIN_WAYS)
    gloo.run(fine_tune_on, config)
    check_same(rows, example, run)
    assert rows[0]["policy_updated"] == 1 and rows[0]["loss"] > 0


def test_warm_start_is_the_stage(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: equal are figures and weights, as of fine-tuning, and what is measured on held-out pairs at the end."""
    example, run = tmp_path / "example", tmp_path / "run"
    ((rows, held_out),) = gloo.run(partial(warm_up, steps=STEPS, output=example))
    gate = GateConfig(gate_prompts=NUM_HELD_OUT, gate_rollouts=HELD_OUT_ROLLOUTS)
    config = replace(MINI_WARM_START, steps=STEPS, gate=gate, checkpoint=saved_in(run), speed=PLAIN_WAYS)
    gloo.run(warm_up_on, config)
    check_same(rows, example, run)
    assert rows[0]["discriminator_updated"] == 1
    assert held_out == json.loads((run / "summary.json").read_text(encoding="utf-8"))["held_out"]


def test_reinforcement_is_the_stage(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: equal are figures and weights, as of fine-tuning: the advantages written out in the example are GRPO's."""
    example, run = tmp_path / "example", tmp_path / "run"
    (rows,) = gloo.run(partial(reinforce, steps=STEPS, output=example))
    config = replace(
        mini_rlvr("grpo", records=False), steps=STEPS, exam=NO_EXAM, checkpoint=saved_in(run), speed=PLAIN_WAYS
    )
    gloo.run(reinforce_on, config)
    check_same(rows, example, run)
    assert rows[0]["policy_updated"] == 1 and 0 < rows[0]["reward/accuracy"] < 1


def test_evaluation_is_that_of_the_tool(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: share of right answers, its change from another policy, interval and verdict are prism-evaluate's."""
    model, base = MINI_FOLDER / "aligned", MINI_FOLDER / "base"
    (paired,) = gloo.run(partial(evaluate, scenes=SCENES, against=base), model)
    config = EvaluateConfig(
        model=str(model), against=str(base), scenes=SCENES, system_prompt=None, max_response_tokens=96,
        output=tmp_path / "run",
    )  # fmt: skip
    gloo.run(evaluate_on, config)
    (expected,) = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["against"]["measures"]
    assert paired.to_plain() == expected
    assert 0 < paired.own < paired.base


@pytest.mark.parametrize("name", ["sft", "warm_start", "rlvr"])
def test_a_command_prints_its_steps(name: str, tmp_path: Path) -> None:
    """Claim: the file by itself plays its steps and leaves a model with the figures of each step printed once."""
    lines = printed(name, "--steps", "1", "--output", str(tmp_path))
    (line,) = [line for line in lines if line.startswith("step ")]
    assert line.startswith("step 1/1: ") and len(figures_of(line)) >= 2
    assert (tmp_path / "hf" / "config.json").is_file()


def test_the_command_that_evaluates(tmp_path: Path) -> None:
    """Claim: the file by itself says the share of right answers, and compares where it is asked to."""
    model = str(MINI_FOLDER / "policy")
    lines = printed("evaluate", model, "--against", model, "--scenes", "4", "--ranks", "2")
    assert lines[0].startswith("2 processes")
    assert lines[1] == lines[2] and lines[1].startswith(f"{model}: right 0.")
    assert lines[3] == "change +0.000 [+0.000, +0.000], p 1: no difference shown"


def test_all_stages_play_in_a_row(tmp_path: Path) -> None:
    """Claim: in one world of two ranks every stage begins with what the one before made, and ends in a model."""
    lines = printed("pipeline", "--shorter", "40", "--scenes", "8", "--tp", "2", "--output", str(tmp_path))
    asked = [line.split(":")[0] for line in lines if line.startswith("after ")]
    assert asked == ["after base", "after sft", "after align", "after rlvr"]
    made = {name: tmp_path / name / "hf" for name in ("sft", "warm_start", "align", "rlvr")}
    assert all((folder / "config.json").is_file() for folder in made.values())


def test_each_stage_starts_from_what_the_one_before_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the policy goes from stage to stage, the discriminator is made of the fine-tuned one and plays against it,
    and what is asked after a stage is what it made. The stages are stand-ins that leave their names.
    """
    played: list[tuple[str, int, str, str]] = []
    asked: list[str] = []

    def stage(name: str) -> Callable[..., object]:
        def play(_world: object, *, steps: int, output: Path, start: Path = FOLDER, judge: str = "") -> None:
            assert output == tmp_path / name
            played.append((name, steps, made(start), made(Path(judge)) if judge else ""))

        return play

    def made(folder: Path) -> str:
        return folder.parent.name if folder.name == "hf" else folder.name

    def answer(_world: object, model: Path, *, scenes: int) -> list[object]:
        asked.append(made(model))
        return [None] * scenes

    for function, name in (
        ("fine_tune", "sft"), ("warm_up", "warm_start"), ("align", "align"), ("reinforce", "rlvr")
    ):  # fmt: skip
        monkeypatch.setattr(pipeline, function, stage(name))
    monkeypatch.setattr(pipeline, "answer", answer)
    monkeypatch.setattr(pipeline, "right", lambda answers: [1.0] * len(answers))
    found = pipeline.play(cast(World, SimpleNamespace(is_main=False)), shorter=20, scenes=3, output=tmp_path)
    assert played == [
        ("sft", 6, "minimal", ""),
        ("warm_start", 2, "sft", ""),
        ("align", 2, "sft", "warm_start"),
        ("rlvr", 2, "align", ""),
    ]
    assert asked == ["base", "sft", "align", "rlvr"] == list(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_stays_on_a_few_screens(path: Path) -> None:
    """Claim: what is said of the examples, at most 120 lines each, holds."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_there_is_one_for_every_stage() -> None:
    """Claim: none of the files that the documentation names is missing, and none is left without a test."""
    assert [path.stem for path in FILES] == ["align", "evaluate", "pipeline", "rlvr", "sft", "warm_start"]


def printed(name: str, *flags: str) -> list[str]:
    """What an example's command prints; it has to end well."""
    result = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *flags], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def figures_of(line: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"([\w/]+) ([-+.\de]+)(?:, |$)", line)}
