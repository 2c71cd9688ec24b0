"""``prism-visual-reliance``: which questions and responses are read, what is written, and what cannot work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from prism_megatron.commands.visual_reliance import main, parse
from prism_megatron.config.tools.visual_reliance import VisualRelianceConfig
from prism_megatron.data.segments import response_text
from prism_megatron.evaluation.bootstrap import Interval
from prism_megatron.stages.visual_reliance.asked import (
    LONG_PROMPT,
    LONG_RESPONSE,
    NO_RESPONSE,
    NOT_IN_FORM,
    Questions,
)
from prism_megatron.stages.visual_reliance.build import lines_of
from prism_megatron.training.prompts import renderer_of
from prism_megatron.training.visual_reliance import Reliance
from tests.mini_players import FOLDER

SCENES = VisualRelianceConfig(model=str(FOLDER), scenes=6, system_prompt=None)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Five records of which the third has no caption."""
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "a.png")
    lines = [
        {"id": f"r{n}", "image": "a.png", "question": "How many red circles are there?", "choices": None, "answer": "1",
         "answer_type": "integer", "solution": "red circle: 1", "caption": None if n == 2 else "- red circle: 1",
         "source": "mine"} for n in range(5)
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_the_table() -> None:
    lines = lines_of({"caption": Reliance(256, 9120, -0.02, -1.31, Interval(1.29, 1.21, 1.37))})
    assert lines[1].split() == ["caption", "256", "9120", "-0.020", "-1.310", "1.290", "[1.210,", "1.370]"]


def test_given_responses_are_read_in_place_of_references(tmp_path: Path) -> None:
    """Claim: by the ids of questions, one a question; those without one, or not in form, are counted."""
    renderer = renderer_of(FOLDER, SCENES.as_trained)
    own = {one.prompt.id: one for one in Questions(SCENES, renderer)}
    ids = list(own)
    lines = [{"id": one, "response": response_text("- red circle: 1", "1", "1")} for one in ids[:3]]
    lines += [{"id": ids[3], "response": "no form"}, {"id": "another", "response": "x"}]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    questions = Questions(replace(SCENES, responses=path), renderer)
    found = list(questions)
    assert [one.prompt.id for one in found] == ids[:3]
    text = renderer.decode(found[0].response.token_ids[:-1])
    assert text == lines[0]["response"]
    assert dict(questions.left_out) == {NO_RESPONSE: 2, NOT_IN_FORM: 1}


def test_records_are_read_by_part_and_size(records: Path) -> None:
    """Claim: all records or those held out, the first so many; what has no caption or is too long is counted."""
    renderer = renderer_of(FOLDER, SCENES.as_trained)
    config = replace(SCENES, scenes=0, data=records, part="all")

    def asked(**changes: object) -> tuple[list[str], dict[str, int]]:
        questions = Questions(replace(config, **changes), renderer)  # type: ignore[arg-type]
        return [one.prompt.id for one in questions], {key: count for key, count in questions.left_out.items() if count}

    assert asked() == (["r0", "r1", "r3", "r4"], {NO_RESPONSE: 1})
    assert asked(limit=2) == (["r0", "r1"], {})
    assert asked(max_response_tokens=3) == ([], {NO_RESPONSE: 1, LONG_RESPONSE: 4})
    assert asked(max_prompt_tokens=3) == ([], {NO_RESPONSE: 1, LONG_PROMPT: 4})
    held_out, _ = asked(part="validation")
    assert set(held_out) < {"r0", "r1", "r3", "r4"}


def test_scenes_are_asked_as_the_mini_is_trained() -> None:
    """Claim: without a system prompt, unless one is named; records are asked with the structured one."""
    argv = ["--model", str(FOLDER), "--scenes", "4"]
    assert parse(argv).system_prompt is None
    assert parse([*argv, "--system-prompt", "Look."]).system_prompt == "Look."
    assert "<caption>" in (parse(["--model", "m", "--data", str(FOLDER)]).system_prompt or "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--scenes", "4"], "--model is needed"),
        (["--model", str(FOLDER)], "name either --data FOLDER or --scenes N"),
        (["--model", str(FOLDER), "--data", ".", "--scenes", "4"], "name either --data FOLDER or --scenes N"),
        (["--model", str(FOLDER), "--data", "nowhere"], "--data nowhere is not a folder"),
        (["--model", str(FOLDER), "--scenes", "4", "--responses", "no.jsonl"], "no.jsonl is no file of responses"),
        (["--model", str(FOLDER), "--scenes", "4", "--tp", "3"], "--tp 3 does not divide the model"),
        (["--model", "./nowhere", "--scenes", "4"], "./nowhere"),
    ],
)
def test_what_cannot_work_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1
