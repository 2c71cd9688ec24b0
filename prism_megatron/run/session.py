"""A run's folder, its clocks and its progress lines: what the stages that train share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.engine import checkpoint
from prism_megatron.engine.runtime import World
from prism_megatron.errors import CheckpointError, ConfigError
from prism_megatron.observability.metrics import Row
from prism_megatron.observability.progress import Progress
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.parallel.collectives import broadcast_object

METRICS, SUMMARY, REPORT, CONFIG = "metrics.jsonl", "summary.json", "report.html", "config.yaml"
CHECKPOINTS, EXPORT = "checkpoints", "hf"

ConfigT = TypeVar("ConfigT")


class Session(Generic[ConfigT]):
    """What the parts of one run share: its folder, its clocks and its progress lines (main rank only)."""

    def __init__(self, config: ConfigT, world: World, output: Path, *, total_steps: int) -> None:
        self.config = config
        self.world = world
        self.output = output
        self.timers = PhaseTimers()
        self.other_seconds: dict[str, float] = {}
        self._progress = Progress(total_steps=total_steps)

    def say(self, text: str) -> None:
        """One line with the seconds so far."""
        if self.world.is_main:
            self._progress.phase(text)

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Say that a phase outside the steps begins, and time it."""
        self.say(text)
        started = time.perf_counter()
        yield
        self.other_seconds[name] = self.other_seconds.get(name, 0.0) + time.perf_counter() - started

    def show(self, row: Row) -> None:
        """One line of the live table."""
        if self.world.is_main:
            self._progress.row(row)


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


def checkpoint_to_load(root: Path | None, output: Path) -> Path | None:
    """The checkpoint that ``--load`` means; None for a new run, and for one killed before its first checkpoint.

    Raises CheckpointError when ``root`` is neither a checkpoint nor a run folder, or when ``output`` holds newer
    checkpoints, which would be mixed with this run's.
    """
    if root is None:
        return None
    folder = broadcast_object(checkpoint.latest(root) or checkpoint.latest(root / CHECKPOINTS), source=0)
    if folder is None:
        if not (root / CONFIG).is_file():
            raise CheckpointError(f"--load {root} is neither a run folder nor a checkpoint; give one of those")
        return None
    newest = broadcast_object(checkpoint.latest(output / CHECKPOINTS), source=0)
    if newest is not None and newest.name > folder.name:
        raise CheckpointError(f"{newest} is newer than --load {folder}; remove it, or give another --output")
    return folder


def step_of(state: Mapping[str, Any], folder: Path, *, steps: int, seed: int) -> int:
    """The step that a checkpoint's run goes on with.

    Raises CheckpointError when the checkpoint is past ``--steps``, or of another seed: its data and samples would not
    be those of an uninterrupted run.
    """
    if state["step"] > steps:
        raise CheckpointError(f"{folder} is past --steps {steps}; ask for at least {state['step']}")
    if state["seed"] != seed:
        raise CheckpointError(f"{folder} belongs to --seed {state['seed']}, this run has --seed {seed}")
    return int(state["step"])
