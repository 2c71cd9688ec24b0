"""Where a run writes."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prism_megatron.run.files import CHECKPOINTS, CONFIG, EXPORT, METRICS

_EARLIER = "earlier-"


def holds_run(folder: Path) -> bool:
    """Whether a run has left rows or checkpoints in ``folder``."""
    return (folder / METRICS).exists() or (folder / CHECKPOINTS).exists()


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, ``RUN/checkpoints/step_000040``; None for one that lies by itself."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def newest_config(folder: Path) -> Path | None:
    """How the latest part of a run was configured: ``config-step_000040.yaml`` after ``config.yaml``."""
    first = folder / CONFIG
    later = sorted(folder.glob(f"{first.stem}-step_*{first.suffix}"))
    return later[-1] if later else first if first.is_file() else None


def left_in(folder: Path) -> list[Path]:
    """What the newest run has left in ``folder``: all but what was moved aside."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(_EARLIER)]


def move_aside(folder: Path) -> Path:
    """Move all that a run left in ``folder`` into ``earlier-1`` (2, 3, …) inside it. Returns where it is now."""
    left = left_in(folder)
    aside = _make_new(folder, lambda attempt: f"{_EARLIER}{attempt}")
    for entry in left:
        entry.rename(aside / entry.name)
    return aside


def remove_halves(folder: Path) -> None:
    """Remove what a killed command had half written in its run folder: an exported model, files on their way.

    They have names that nothing reads (``disk.folder_beside``, ``disk.write_atomically``), and the command of the run,
    of which there is one at a time, is the only one to write there.
    """
    for half in [*folder.glob(f".{EXPORT}.*"), *folder.glob(".*.part")]:
        if half.is_dir():
            shutil.rmtree(half)
        else:
            half.unlink()


def move_over(folder: Path, target: Path) -> None:
    """Rename a folder, in place of whatever had that name."""
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def folder_of_new_run(kind: str) -> Path:
    """Make a folder for a new run, named after ``kind`` and the time, that no other command can have taken."""
    name = time.strftime(f"{kind}-%Y%m%d-%H%M%S")
    return _make_new(Path("runs"), lambda attempt: name if attempt == 1 else f"{name}-{attempt}")


def _make_new(parent: Path, name: Callable[[int], str]) -> Path:
    """A folder that did not exist before: two commands started in the same second get two."""
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count(1):
        folder = parent / name(attempt)
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("itertools.count has no end")
