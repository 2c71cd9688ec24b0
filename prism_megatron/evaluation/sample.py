"""Answers as the report shows them, and how they wait in ``samples.json`` for a report that is made later."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from prism_megatron.disk import write_atomically
from prism_megatron.errors import DataError
from prism_megatron.observability.metrics import to_json

MAX_SAMPLES = 3
_MAX_IMAGE_SIDE = 320
_URL_HEAD = "data:image/png;base64,"


@dataclass(frozen=True)
class Sample:
    """One answer as it is shown. ``scores`` by tower are None where it was not judged.

    Example: ``Sample([png_url(image)], "How many?", "<answer>3</answer>", "…", "no caption")``.
    """

    images: Sequence[str]
    """PNG files as data URLs"""
    prompt: str
    response: str
    reference: str
    problem: str | None
    """why the response is not valid; None if it is"""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    reference_scores: Mapping[str, float | None] = field(default_factory=dict)


def png_url(image: Image.Image) -> str:
    """The image, made small, as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((_MAX_IMAGE_SIDE, _MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return _URL_HEAD + base64.b64encode(buffer.getvalue()).decode("ascii")


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write the first of them in one rename."""
    write_atomically(path, to_json([asdict(sample) for sample in samples[:MAX_SAMPLES]], indent=2) + "\n")


def read_samples(path: Path) -> list[Sample]:
    """What :func:`write_samples` wrote. Raises DataError for a file that it did not write."""
    try:
        return [_sample(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it, and the report shows no samples") from error


def _sample(entry: Mapping[str, Any]) -> Sample:
    problem = entry["problem"]
    return Sample(
        images=[_checked_url(url) for url in entry["images"]],
        prompt=str(entry["prompt"]),
        response=str(entry["response"]),
        reference=str(entry["reference"]),
        problem=None if problem is None else str(problem),
        scores=_scores(entry["scores"]),
        reference_scores=_scores(entry["reference_scores"]),
    )


def _scores(entry: Mapping[str, Any]) -> dict[str, float | None]:
    return {str(tower): None if score is None else float(score) for tower, score in entry.items()}


def _checked_url(url: str) -> str:
    """The same data URL, which can hold nothing but an image's bytes. Raises ValueError."""
    head, encoded = url[: len(_URL_HEAD)], url[len(_URL_HEAD) :]
    if head != _URL_HEAD:
        raise ValueError("an image is no PNG data URL")
    try:
        base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError("an image is not base64") from error
    return url
