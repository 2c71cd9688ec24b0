"""Where a run writes."""

from __future__ import annotations

import itertools
import time
from contextlib import suppress
from pathlib import Path

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.run.files import CHECKPOINTS, CONFIG, METRICS


def claim_run_folder(config: CheckpointConfig, world: World, *, kind: str) -> Path:
    """The run's folder, made by the main rank and known to all.

    ``--output``; else the run that ``--load`` goes on with; else a new folder, named after ``kind`` and the time, that
    no other command can have taken. Raises ConfigError when a new run would write over an older one.
    """
    folder, problem = None, None
    if world.is_main:
        resumed = config.load if config.load is not None and (config.load / CONFIG).is_file() else None
        folder = config.output or resumed or _new_folder(Path("runs"), time.strftime(f"{kind}-%Y%m%d-%H%M%S"))
        if config.load is None and ((folder / METRICS).exists() or (folder / CHECKPOINTS).exists()):
            problem = (
                f"--output {folder} holds an earlier run; go on with it by --load {folder}, or give another folder"
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
    folder, problem = broadcast_object((folder, problem), source=0)
    if problem is not None:
        raise ConfigError(problem)
    assert folder is not None
    return folder


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that did not exist before: two commands started in the same second get two."""
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count(1):
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("itertools.count has no end")
