"""Samples come back from their file as they went in, and what is no image's bytes does not come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from prism_megatron.errors import DataError
from prism_megatron.evaluation.sample import MAX_SAMPLES, Sample, png_url, read_samples, write_samples


def sample(number: int) -> Sample:
    image = Image.new("RGB", (8, 4), (number, 0, 0))
    scores = {"perception": 1.5, "reasoning": None}
    return Sample([png_url(image)], "How many?", f"answer {number} \u202e", "reference", "no caption", scores, scores)


def test_samples_come_back_and_no_more_than_three(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    write_samples(path, [sample(number) for number in range(5)])
    assert read_samples(path) == [sample(number) for number in range(MAX_SAMPLES)]


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/x.png",
        "http://evil.example/xxAAAA",
        "data:image/png;base64,AAAA' onerror='x",
        "data:image/svg+xml;base64,AAAA",
        7,
        None,
    ],
)
def test_an_image_is_its_bytes(tmp_path: Path, url: object) -> None:
    path = tmp_path / "samples.json"
    write_samples(path, [sample(0)])
    document = json.loads(path.read_text(encoding="utf-8"))
    document[0]["images"] = [url]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=r"samples\.json is damaged"):
        read_samples(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[[]]", '[{"prompt": "x"}]', "7", '{"a": 1}'])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "samples.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="remove it"):
        read_samples(path)
