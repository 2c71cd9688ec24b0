"""The fifth step: the best problems whose answers rules can check go to alignment and RL, the rest to fine-tuning.

The score of a demonstration is a mean, weighted as ``config.tools.curate.Quality`` says, of up to five numbers from 0
to 1::

    unaided    1 if the teacher was not told the answer, else 0
    at_once    1 / the teacher's replies that it took
    hard       1 - the highest pass rate of a strong model; left out where none was asked
    caption    min(1, words of the caption / caption_words)
    reasoning  min(1, words of the reasoning / reasoning_words)
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prism_megatron.config.tools.curate import Quality
from prism_megatron.curation.correct import by_rules
from prism_megatron.curation.files import Row, rows_of

SFT, ALIGN = "sft", "align"


def quality_of(found: Mapping[str, Any], weights: Quality) -> float:
    """The score of a row, from what its steps have found."""
    answer = found["answer"]
    rate = found.get("select", {}).get("pass_rate")
    parts = [
        (weights.unaided, float(answer["unaided"])),
        (weights.at_once, 1.0 / answer["attempts"]),
        (weights.caption, min(1.0, len(answer["caption"].split()) / weights.caption_words)),
        (weights.reasoning, min(1.0, len(answer["solution"].split()) / weights.reasoning_words)),
        *([] if rate is None else [(weights.hard, 1.0 - rate)]),
    ]
    total = sum(weight for weight, _ in parts)
    return sum(weight * value for weight, value in parts) / total if total else 0.0


def split(path: Path, *, best: int, weights: Quality, seed: int) -> Iterator[Row]:
    """The rows that the step before kept, in its order, each with its score and the set that it goes to.

    The file is read twice; memory grows by 24 bytes a row. Equal scores are ordered by a hash that ``seed`` keys.
    """
    scores, ties, checkable = array("d"), array("Q"), array("b")
    for row in rows_of(path, kept_only=True):
        scores.append(quality_of(row.found, weights))
        ties.append(_tie(row.problem.id, seed))
        checkable.append(by_rules(row.problem))
    may = np.flatnonzero(np.frombuffer(checkable, dtype=np.int8))
    score, tie = np.frombuffer(scores, dtype=np.float64)[may], np.frombuffer(ties, dtype=np.uint64)[may]
    chosen = set(may[np.lexsort((tie, -score))[:best]].tolist())
    for place, row in enumerate(rows_of(path, kept_only=True)):
        found = {"score": scores[place], "to": ALIGN if place in chosen else SFT, "by_rules": bool(checkable[place])}
        yield row.having("split", found)


def _tie(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest(), "little")
