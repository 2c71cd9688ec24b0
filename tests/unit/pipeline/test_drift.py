"""Distances in a pipeline's table are those of the greedy answers to the same questions."""

from __future__ import annotations

import json
from pathlib import Path

from prism_megatron.pipeline.drift import drift_from


def write(folder: Path, items: int, steps: int, *, count: int = 30) -> Path:
    """Greedy answers of so many items and steps, and sampled ones of none."""
    folder.mkdir()
    caption = "\n".join(["- circle"] * items)
    think = "\n".join(f"Step {number}" for number in range(steps))
    answer = f"<caption>\n{caption}\n</caption>\n<think>\n{think}\n</think>\n<answer>1</answer>"
    other = "<caption>\nnone\n</caption>\n<think>\nso\n</think>\n<answer>1</answer>"
    lines = [
        {"set": "scenes", "id": f"scene-{number}", "mode": mode, "sample": 0, "text": text}
        for number in range(count)
        for mode, text in (("greedy", answer), ("sampled", other))
    ]
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_distances_are_from_the_base_s_greedy_answers(tmp_path: Path) -> None:
    base, own = write(tmp_path / "base", 2, 3), write(tmp_path / "own", 4, 6)
    assert drift_from(base, own) == {"caption_items": 2.0, "reasoning_steps": 3.0}
    assert drift_from(base, base) == {"caption_items": 0.0, "reasoning_steps": 0.0}


def test_a_few_answers_have_no_distance(tmp_path: Path) -> None:
    base, own = write(tmp_path / "base", 2, 3, count=5), write(tmp_path / "own", 4, 6, count=5)
    assert drift_from(base, own) == {"caption_items": None, "reasoning_steps": None}
