"""What supervised training reads: turns of text and pictures, whatever format they were stored in.

Adapters (``data/formats``) make them, ``data/render_conversation.py`` makes tokens and labels of them.

Example: one question about one picture, answered::

    Conversation("7", (Turn("user", (Picture(Path("7.png")), "How many?")), Turn("assistant", ("Two.",))), "own")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Picture:
    """An image as it was stored: the path of a file inside the set's folder, or the bytes of one."""

    stored: Path | bytes


@dataclass(frozen=True)
class Turn:
    """What one side says: text and pictures in their order. Only users show pictures."""

    role: Role
    parts: tuple[str | Picture, ...]

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.parts if isinstance(part, Picture))


@dataclass(frozen=True)
class Conversation:
    """One demonstration: turns that end with the assistant's.

    ``source`` is the set that it comes from, by which mixtures weigh it and held-out losses are split; ``answer`` is
    the answer alone, where the set has it.
    """

    id: str
    turns: tuple[Turn, ...]
    source: str
    answer: str | None = None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Of all turns, in their order."""
        return tuple(picture for turn in self.turns for picture in turn.pictures)
