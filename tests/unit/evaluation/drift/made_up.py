"""Sets of responses and embeddings that tests make up, and damage to texts."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from prism_megatron.evaluation.drift.relabelling import Array
from prism_megatron.evaluation.drift.responses import Responses

DIMENSIONS = 64


def words_at_random(texts: Sequence[str]) -> Array:
    """The mean of a text's words, each of which is a point that its letters decide on, made one long."""
    points = np.zeros((len(texts), DIMENSIONS))
    for number, text in enumerate(texts):
        words = text.split()
        mean = np.mean([point_of(word) for word in words], axis=0) if words else np.zeros(DIMENSIONS)
        points[number] = mean / max(float(np.linalg.norm(mean)), 1e-300)
    return points


@cache
def point_of(word: str) -> Array:
    """A draw around a point that all words have in common, as those of learned embeddings do."""
    return 0.3 + np.random.default_rng(zlib.crc32(word.encode())).normal(size=DIMENSIONS)


def reasonings(name: str, texts: Iterable[str], *, first_id: int = 0) -> Responses:
    """Responses that are a reasoning alone; ids count from ``first_id`` on."""
    return Responses(
        name,
        {str(number): {"reasoning": text} for number, text in enumerate(texts, first_id)},
        not_in_form=0,
        left_out=0,
    )


def with_words_dropped(text: str, share: float, draw: random.Random) -> str:
    """Each word, with the white space after it, goes with this probability."""
    return "".join(word for word in re.findall(r"\S+\s*", text) if draw.random() >= share)


def first_half(text: str) -> str:
    """The longer half of its words."""
    words = re.findall(r"\S+\s*", text)
    return "".join(words[: (len(words) + 1) // 2])
