"""What a curation writes is what the stages read: fine-tuning, pairs, a warm-start and alignment on it.

Blind spot: what a model learns from it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands.curate import main as curate
from prism_megatron.commands.make_pairs import main as make_pairs
from prism_megatron.config.merge import to_yaml
from prism_megatron.config.tools.curate import Endpoint, Model, Recipe
from prism_megatron.data.segments import response_text
from prism_megatron.observability.metrics import read_metrics
from tests.conftest import REPOSITORY
from tests.integration.test_align_records import write_records
from tests.unit.curation.mock_teacher import mock_teacher

pytest.importorskip("datasketch")

PROBLEMS = 40
SIZES = ("--prompts-per-step", "2", "--tokens-per-microbatch", "512")


def ran(tool: str, *flags: str) -> None:
    words = [sys.executable, str(REPOSITORY / "tools" / tool), *flags]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def make_problems(folder: Path) -> list[dict[str, Any]]:
    """Scenes without captions and solutions; each question has its number, and the records are what they should get."""
    write_records(folder, PROBLEMS)
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for number, one in enumerate(records):
        one["question"] += f" ({number})"
    asked = [{**one, "caption": None, "solution": None} for one in records]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    return records


@pytest.mark.long
def test_every_stage_trains_on_what_was_curated(tmp_path: Path) -> None:
    """Claim: of forty problems nearly all are written, and 20 steps of fine-tuning, pairs of the references with a
    student's answers, a warm-start on them and a step of alignment end well."""
    records = make_problems(tmp_path / "pool")

    def scholar(text: str) -> str:
        found = re.search(r"\((\d+)\)", text)
        assert found is not None
        one = records[int(found[1])]
        return response_text(one["caption"], one["solution"], one["answer"])

    with mock_teacher(others={"scholar": scholar}) as teacher:
        recipe = Recipe(data=(tmp_path / "pool",), teacher=Model("scholar", (Endpoint(teacher.url),)), best=20)
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        assert curate(["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "curated")]) == 0
    sft, align = tmp_path / "curated" / "sft", tmp_path / "curated" / "align"
    written = [json.loads(line) for folder in (sft, align) for line in (folder / "data.jsonl").read_text().splitlines()]
    assert len(written) > 0.8 * PROBLEMS, "hardly any problem is another's duplicate"
    assert {(one["id"], one["caption"], one["solution"]) for one in written} <= {
        (one["id"], one["caption"], one["solution"]) for one in records
    }
    ran("run_sft.py", "--data", str(sft), "--index", str(tmp_path / "index"), "--steps", "20", "--epochs", "40",
        "--rows-per-step", "1", "--max-tokens", "700", "--output", str(tmp_path / "sft"))  # fmt: skip
    assert len(read_metrics(tmp_path / "sft" / "metrics.jsonl")) == 20
    ids = [json.loads(line)["id"] for line in (align / "data.jsonl").read_text().splitlines()]
    student = response_text("- red circle: 1", "red circle: 1", "9")
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps({"id": one, "response": student}) + "\n" for one in ids))
    answers = ["--answers", str(tmp_path / "answers.jsonl")]
    assert make_pairs(["--data", str(align), *answers, "--output", str(tmp_path / "pairs")]) == 0
    ran("run_warm_start.py", "--pairs", str(tmp_path / "pairs" / "pairs.jsonl"), "--steps", "2", "--gate-prompts", "1",
        *SIZES, "--output", str(tmp_path / "warm"))  # fmt: skip
    ran("run_align.py", "--data", str(align), "--format-sft", "3", "--format-sft-lr", "1e-5", "--steps", "1",
        "--rollouts-per-prompt", "2", *SIZES, "--output", str(tmp_path / "align"))  # fmt: skip
    (row,) = read_metrics(tmp_path / "align" / "metrics.jsonl")
    assert row["valid_rollouts"] > 0 and row["policy_grad_norm"] > 0
