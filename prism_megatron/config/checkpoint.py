"""Where a run writes, and where it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prism_megatron.config.fields import AT_LEAST_ONE, ExistingFolder


@dataclass(frozen=True)
class CheckpointConfig:
    """Run folder and checkpoints; the last step is always saved."""

    output: Path | None = None
    """run folder; without it that of --load, or a new one under runs/"""
    load: Annotated[Path | None, ExistingFolder()] = None
    """checkpoint, or run folder whose newest checkpoint, to go on from"""
    save_every: Annotated[int, AT_LEAST_ONE] = 100
    """steps between checkpoints"""
