"""When is a finished step still the one that is asked for? (Which steps are played again: ``test_play.py``.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.pipeline.identity import Identity, digest_of_data, identities
from tests.unit.pipeline.fakes import STEPS, Home


def of(home: Home, key: str = "stages/reward") -> Identity:
    return identities(home.plan().steps, {})[key]


def test_where_a_pipeline_lies_does_not_count(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert of(Home(tmp_path / "one")) == of(Home(tmp_path / "two"))


def test_a_stage_s_own_name_does_not_count(tmp_path: Path) -> None:
    """Claim: what counts of an earlier stage is what it makes."""
    assert of(Home(tmp_path)) == of(Home(tmp_path, STEPS.replace("teach", "taught")))


def test_a_choice_changes_the_result_and_not_the_work(tmp_path: Path) -> None:
    before = of(Home(tmp_path), "stages/choose")
    after = of(Home(tmp_path, STEPS.replace("tool: choose", "tool: choose\n    keep: 0.1")), "stages/choose")
    assert before.work == after.work and before.result != after.result


def test_other_answers_to_compare_with_change_the_result_and_not_the_work(tmp_path: Path) -> None:
    """Claim: where only the base is another, answers are kept, and compared anew."""
    own = f"{{tool: train, model: {{model: {tmp_path / 'x'}}}}}"
    text = f"stages:\n  a: {{tool: train}}\n  b: {own}\nevaluate: {{scenes: 1}}"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    before = of(Home(tmp_path, text), "evaluations/b")
    (tmp_path / "mini" / "config.json").write_text("{ }")
    plan = Home(tmp_path, text).plan()
    (tmp_path / "mini" / "config.json").write_text("{ }")
    after = identities(plan.steps, {})["evaluations/b"]
    assert before.work == after.work and before.result != after.result


def test_the_weights_of_a_named_model_count(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    home = Home(tmp_path, STEPS.replace("tool: train\n    steps: 3", f"tool: train\n    model: {{model: {folder}}}"))
    before = of(home)
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert of(home) != before


@pytest.mark.parametrize(
    ("name", "before", "after", "differs"),
    [
        ("data.jsonl", b"x" * 150_000 + b"3" + b"x" * 450_000, b"x" * 150_000 + b"5" + b"x" * 450_000, True),
        ("a.png", b"one", b"four", True),
        ("a.png", b"one", b"two", False),
        ("a.tar", b"one", b"two", True),
    ],
)
def test_what_counts_of_data(name: str, before: bytes, after: bytes, differs: bool, tmp_path: Path) -> None:
    """Claim: all of a text, the size of a picture."""
    (tmp_path / name).write_bytes(before)
    digests = [digest_of_data(tmp_path), digest_of_data(tmp_path / name)]
    (tmp_path / name).write_bytes(after)
    again = [digest_of_data(tmp_path), digest_of_data(tmp_path / name)]
    assert [old != new for old, new in zip(digests, again, strict=True)] == [differs, differs]


def test_the_name_of_a_file_in_a_set_counts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    before = digest_of_data(tmp_path)
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert digest_of_data(tmp_path) != before
