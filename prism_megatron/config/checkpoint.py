"""Where a run writes, and where it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from prism_megatron.config.fields import AT_LEAST_ONE, ExistingFolder, OnResume


@dataclass(frozen=True)
class CheckpointConfig:
    """Run folder and checkpoints; the last step is always saved."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    output: Annotated[Path | None, OnResume.COMMAND] = None
    """run folder; without it that of --load, or a new one under runs/"""
    load: Annotated[Path | None, ExistingFolder(), OnResume.COMMAND] = None
    """checkpoint, or run folder whose newest checkpoint, to go on from"""
    save_every: Annotated[int, AT_LEAST_ONE] = 100
    """steps between checkpoints"""
    save_async: bool = False
    """write checkpoints beside the steps, from a copy in host memory (each rank's own part); one at a time"""
    keep_last: Annotated[int | None, AT_LEAST_ONE] = None
    """how many of the newest checkpoints to keep, beside the newest good one and the best one; by default all"""
