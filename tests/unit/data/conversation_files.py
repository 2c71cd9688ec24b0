"""Files of conversations for tests, made from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SOURCES = ("a", "b", "c")


def write_conversations(folder: Path, count: int, *, seed: int = 0, name: str = "data.jsonl") -> Path:
    """Lines about one of four tiny images, some without; answers of lengths that a lognormal draws."""
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        Image.new("RGB", (32 * (number + 1), 32), (60 * number, 0, 0)).save(images / f"{number}.png")
    lines = []
    for number in range(count):
        words = " ".join(["word"] * int(np.clip(rng.lognormal(2.0, 0.8), 1, 80)))
        shown = [] if number % 5 == 4 else [{"image": f"images/{rng.integers(4)}.png"}]
        lines.append(line_of(number, shown, words))
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line_of(number: int, shown: Sequence[dict[str, str]], answer: str) -> str:
    turns = [
        {"role": "user", "parts": [*shown, {"text": f"Question {number}?"}]},
        {"role": "assistant", "parts": answer},
    ]
    return json.dumps({"id": f"r{number}", "source": SOURCES[number % 3], "turns": turns})


class Tally:
    """Counts as an ``Activity`` does, and keeps what it was told."""

    def __init__(self) -> None:
        self.done: dict[str, list[int]] = {}

    @contextmanager
    def task(self, unit: str, *, total: int) -> Iterator[Any]:
        self.done[unit] = [0, total]

        def advance(count: int) -> None:
            self.done[unit][0] += count

        yield advance
