"""Plays the steps of a plan, each by its own command, and leaves alone those that are done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prism_megatron.config.json_file import read_object
from prism_megatron.config.merge import save
from prism_megatron.disk import writing
from prism_megatron.errors import ConfigError, DataError, PrismError
from prism_megatron.pipeline.identity import Identity, identities
from prism_megatron.pipeline.plan import Plan, Step
from prism_megatron.pipeline.process import Processes
from prism_megatron.pipeline.state import Record, State
from prism_megatron.run.files import SUMMARY
from prism_megatron.run.folder import left_in, move_aside

CONFIGS = "configs"
"""The folder of the settings that every step was started with."""
Say = Callable[[str], None]


class StepFailed(PrismError):  # noqa: N818  # named as what happened
    """A step's command ended badly, after saying why; ``status`` is its own."""

    def __init__(self, message: str, status: int) -> None:
        """``status`` is what the pipeline exits with."""
        super().__init__(message)
        self.status = status


def play(plan: Plan, state: State, processes: Processes, *, report: Callable[[], None], say: Say) -> None:
    """Every step that is not done. ``report`` is called after each.

    Raises StepFailed where a command fails, RunStopped where a signal ends the pipeline, ConfigError for a step before
    ``--from`` that is not done.
    """
    wanted = identities_of(plan, state)
    for step in plan.steps:
        if _is_done(state.records.get(step.key), wanted[step.key], plan.output / step.key):
            say(f"{step.name}: done before")
            continue
        if step.stage in plan.earlier:
            raise ConfigError(f"--from: {step.name} is not done, and comes before it; begin there, or earlier")
        _make_room(plan.output / step.key, state, wanted[step.key], step, say)
        state.begin(step.key, wanted[step.key])
        _play_one(step, plan.output, state, processes, say)
        report()


def identities_of(plan: Plan, state: State) -> dict[str, Identity]:
    """What every step is to be; those before ``--from`` are what they were done as."""
    known = {
        step.key: state.records[step.key].identity
        for step in plan.steps
        if step.stage in plan.earlier and step.key in state.records
    }
    return identities(plan.steps, known)


def command_of(step: Step, output: Path) -> list[str]:
    """The words that play a step: those of its launcher, or Python, then its own tool's with the settings' file."""
    return [
        *(step.launcher or (sys.executable,)),
        *step.tool.command,
        "--config",
        str(config_path(step, output)),
        "--output",
        str(output / step.key),
        *step.tool.resume,
    ]


def config_path(step: Step, output: Path) -> Path:
    """Where the settings stand that a step is started with."""
    return output / CONFIGS / f"{step.key.replace('/', '-')}.yaml"


def _play_one(step: Step, output: Path, state: State, processes: Processes, say: Say) -> None:
    words = command_of(step, output)
    say(f"{step.name} ({step.tool.name}): {' '.join(words)}")
    with writing(output):
        (output / step.key).parent.mkdir(parents=True, exist_ok=True)
        # An old one would say that this try has come to its end.
        (output / step.key / SUMMARY).unlink(missing_ok=True)
        save(step.config, config_path(step, output))
    began = time.monotonic()
    try:
        status = processes.run(words)
    except OSError as error:
        raise ConfigError(f"{step.name}: {words[0]} cannot be started: {error.strerror}; see launcher") from error
    seconds = time.monotonic() - began
    done = status == 0 and processes.heard is None and _is_finished(output / step.key)
    state.end(step.key, seconds=seconds, done=done)
    processes.raise_if_asked(f"in {step.name}")
    if status == 0 and not done:
        raise StepFailed(f"{step.name} was stopped before its end; the same command with --resume auto goes on", 3)
    if status != 0:
        how = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
        raise StepFailed(
            f"{step.name} {how}: what it says is above; the same command with --resume auto goes on with it",
            max(status, 1),
        )
    say(f"{step.name}: done after {seconds / 60:.1f} minutes")


def _is_done(record: Record | None, identity: Identity, folder: Path) -> bool:
    return record is not None and record.done and record.identity == identity and _is_finished(folder)


def _is_finished(folder: Path) -> bool:
    """Under torchrun a run that was asked to stop ends with status 0 too: its summary says that it has not ended."""
    if not (folder / SUMMARY).is_file():
        return False
    try:
        summary: Mapping[str, Any] = read_object(folder / SUMMARY, error=DataError)
    except DataError:
        return False
    return bool(summary.get("ended", "done") == "done")


def _make_room(folder: Path, state: State, identity: Identity, step: Step, say: Say) -> None:
    """What other settings or inputs have made is moved aside, and never gone on with."""
    record = state.records.get(step.key)
    if record is not None and record.work == identity.work:
        return
    # What a kill in between leaves is half of something, whatever the file asks for then.
    state.forget(step.key)
    if folder.is_dir() and left_in(folder):
        with writing(folder):
            aside = move_aside(folder)
        say(f"{step.name}: its settings, or what it reads, are others now; what there was is in {aside}")
