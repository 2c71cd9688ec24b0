"""What an index has of each record, and of those that cannot be used."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

COLUMNS: dict[str, type[np.generic]] = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "number": np.int64,
    "text_tokens": np.int32,
    "visual_tokens": np.int32,
    "label_tokens": np.int32,
    "source": np.int32,
    "held_out": np.bool_,
    "content": np.int64,
}
"""Of each record; ``content`` is a hash of its id and text, by which a checkpoint knows its data again."""


class Counting(Protocol):
    """Who is told how much of a long piece of work is done, such as an ``Activity``."""

    def task(self, unit: str, *, total: int) -> AbstractContextManager[Any]:
        """Count what the body does, in ``unit``: it is given a function to tell what was done."""


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: ``file:number`` and what is wrong with it."""

    where: str
    reason: str
