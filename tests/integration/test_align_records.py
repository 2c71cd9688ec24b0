"""The main job on a folder of records, format SFT first (blind spot: whether the mini learns a real set's format)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from prism_megatron.data.scenes import make_scene
from prism_megatron.data.teachers import write
from prism_megatron.observability.metrics import read_metrics

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_align.py"


def write_records(folder: Path, count: int) -> None:
    """Scenes dressed as records of a set."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(count):
        scene = make_scene("align", seed=3, index=index)
        caption, think, answer = write(scene, "faithful")
        scene.image().save(folder / "images" / f"{index}.png")
        lines.append(
            json.dumps(
                {
                    "id": f"made-{index}",
                    "image": f"images/{index}.png",
                    "question": scene.question.text,
                    "choices": None,
                    "answer": answer,
                    "answer_type": "text",
                    "solution": think,
                    "caption": caption,
                    "source": "made/train",
                }
            )
        )
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


def test_records_train_both_players_after_format_sft(tmp_path: Path) -> None:
    """The SFT policy is written and played, and the game gets valid rollouts, pairs and gradients from records.

    Held-out ones are asked for their answer.
    """
    write_records(tmp_path / "set", 40)
    output = tmp_path / "run"
    sizes = ("--prompts-per-step", "2", "--rollouts-per-prompt", "2", "--tokens-per-microbatch", "512")
    result = subprocess.run(
        [sys.executable, str(TOOL), "--data", str(tmp_path / "set"), "--format-sft", "3", "--format-sft-lr", "1e-5",
         "--steps", "1", "--eval-prompts", "2", "--eval-rollouts", "1", "--output", str(output), *sizes],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "format SFT step 3/3" in result.stdout
    assert (output / "format_sft" / "model.safetensors").is_file()
    (row,) = read_metrics(output / "metrics.jsonl")
    assert row["eval/prompts"] == 2 and 0 <= row["eval/greedy/accuracy"] <= 1
    assert "held-out prompts: 2 are asked; 100.0% of the records held out have an answer to check" in result.stdout
    assert row["valid_rollouts"] > 0
    assert row["perception/pairs"] == row["reasoning/pairs"] == row["valid_rollouts"]
    assert row["policy_grad_norm"] > 0
    assert row["discriminator_grad_norm"] > 0
    assert "truth/responses" not in row, "records have no known truth to judge by"
