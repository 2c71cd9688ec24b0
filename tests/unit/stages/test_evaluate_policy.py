"""A whole evaluation of the mini in one process: what is asked, what is too long, and what draws depend on.

Blind spot: several ranks, kills and other forms of a model (``tests/integration/test_evaluate.py``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands.evaluate import parse
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import make_scene
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError
from prism_megatron.stages.evaluate.build import evaluate_on
from tests.integration.test_align_records import write_records

BATCH = 4


def evaluated(world: World, output: Path, *flags: str) -> list[dict[str, Any]]:
    """The lines of an evaluation of the mini."""
    evaluate_on(world, parse([str(MINI_FOLDER / "policy"), "--system-prompt", "None", "--max-response-tokens", "96",
                              "--dtype", "fp32", "--questions-at-once", str(BATCH), "--output", str(output),
                              *flags]))  # fmt: skip
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def answers(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return evaluated(world, tmp_path_factory.mktemp("evaluated") / "out", "--scenes", "8", "--samples", "2")


def test_answers_are_the_policys(answers: list[dict[str, Any]]) -> None:
    """Claim: one greedy answer and all samples, ended and valid, without the end token; samples are drawn apart."""
    assert [(one["mode"], one["sample"]) for one in answers] == [("greedy", 0), ("sampled", 0), ("sampled", 1)] * 8
    assert sum(one["valid"] for one in answers) >= 20
    assert all(one["text"].endswith("</answer>") for one in answers if one["valid"])
    assert sum(a["text"] != b["text"] for a, b in zip(answers[1::3], answers[2::3], strict=True)) >= 4
    assert all(0 < one["tokens"] <= 96 for one in answers)


def test_draws_do_not_depend_on_how_much_is_asked(world: World, answers: list[dict[str, Any]], tmp_path: Path) -> None:
    """Claim: neither fewer questions nor no samples change what is answered to the others."""
    assert evaluated(world, tmp_path / "fewer", "--scenes", "4", "--samples", "2") == answers[:12]
    assert evaluated(world, tmp_path / "greedy", "--scenes", "8") == answers[::3]


def test_a_seed_changes_samples_alone(world: World, tmp_path: Path) -> None:
    """Claim: the greedy answer is drawn by nobody."""
    write_records(tmp_path / "set", 4)
    one, other = (
        evaluated(world, tmp_path / seed, "--data", str(tmp_path / "set"), "--samples", "2", "--seed", seed)
        for seed in ("1", "2")
    )
    assert one[::3] == other[::3]
    assert [line["text"] for line in one] != [line["text"] for line in other]


def test_what_is_too_long_is_a_failure(world: World, answers: list[dict[str, Any]], tmp_path: Path) -> None:
    """Claim: it is asked nothing, counted, and wrong; the others of its batch are asked."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    scenes = [make_scene("heldout", seed=42, index=index) for index in range(8)]
    lengths = [len(renderer.prompt(one.id, one.question.text, [one.image()]).token_ids) for one in scenes]
    limit = sorted(lengths)[3]
    found = evaluated(world, tmp_path / "out", "--scenes", "8", "--max-prompt-tokens", str(limit))
    for one, length, before in zip(found, lengths, answers[::3], strict=True):
        if length > limit:
            assert f"takes {length} tokens, of which --max-prompt-tokens allows {limit}" in one["failure"]
            assert not one["counts"] and one["text"] == "" and one["tokens"] is None
        else:
            assert one["text"] == before["text"] and one["failure"] == ""
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["failures"] == sum(length > limit for length in lengths) > 0
    none = evaluated(world, tmp_path / "none", "--scenes", "4", "--max-prompt-tokens", "9")
    assert all(one["failure"] for one in none)


def test_what_cannot_fit_leaves_no_answers(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model allows 4096"):
        evaluated(world, tmp_path / "out", "--scenes", "4", "--max-prompt-tokens", "9999")
    assert not (tmp_path / "out" / "answers.jsonl").exists()
