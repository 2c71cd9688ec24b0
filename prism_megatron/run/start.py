"""Where a run begins: in a new folder, or where an earlier command of it ended. Nothing is written before it may be.

Free of torch: the tools ask here before any process is started, the driver asks again on the main rank.
"""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.fields import OnResume, fields_of
from prism_megatron.config.merge import merge, save
from prism_megatron.config.resume import check_changes, check_resume, differences
from prism_megatron.config.run import RunConfig
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.conversion.checkpoints.folder import latest, latest_whole
from prism_megatron.errors import CheckpointError, ConfigError
from prism_megatron.run.files import CHECKPOINTS, CONFIG, RECORD
from prism_megatron.run.folder import holds_run, newest_config, run_of
from prism_megatron.run.record import read_record
from prism_megatron.run.saved import SavedRun


class StageConfig(Protocol):
    """What a run's driver reads of a stage's configuration."""

    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def seed(self) -> int: ...


ConfigT = TypeVar("ConfigT", bound=StageConfig)


@dataclass(frozen=True)
class Start:
    """How a command takes a run up; the same on every rank."""

    output: Path | None
    """the run's folder; None for a new one, which has no name yet"""
    run: str
    """the run's identity, which its checkpoints carry"""
    saved: SavedRun | None = None
    """the checkpoint that it goes on from"""
    lines: Sequence[str] = ()
    """what differs from how it was begun, in words"""
    begins_anew: bool = False
    """whether the folder holds rows of a try that left no checkpoint"""
    damaged: Sequence[Path] = ()
    """newer checkpoints than ``saved`` that lack bytes"""

    @property
    def restored(self) -> Path | None:
        """The folder of the checkpoint to go on from."""
        return None if self.saved is None else self.saved.folder


def defaults_of(argv: Sequence[str], fresh: ConfigT, *, stage: str) -> ConfigT:
    """What flags are laid over: the run's own configuration where ``argv`` goes on with one, else ``fresh``.

    Raises as :func:`checkpoint_of`, and ConfigError for a bad YAML file.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--load", "--output"):
        early.add_argument(flag, type=Path)
    early.add_argument("--resume")
    known, _ = early.parse_known_args(argv)
    yaml = read_yaml(known.config) if known.config else {}
    load, output = (getattr(known, name) or _path(yaml, "checkpoint", name) for name in ("load", "output"))
    resume = known.resume or _named(yaml, "run", "resume") or "no"
    if load is not None and not load.is_dir():
        return fresh  # the complaint about the flag says it best
    folder = checkpoint_of(CheckpointConfig(output=output, load=load), resume=resume)
    if folder is None:
        earlier = newest_config(output) if resume == "auto" and output is not None else None
        return fresh if earlier is None else _read_or(earlier, fresh)
    config = SavedRun.read(folder, stage=stage).config(type(fresh)())
    return fresh if config is None else without_command(config)


def checkpoint_of(checkpoint: CheckpointConfig, *, resume: str) -> Path | None:
    """The checkpoint that ``--load`` or ``--resume auto`` means; None for a run that begins.

    The second passes over newer ones that are damaged.

    Raises ConfigError for flags that contradict each other, CheckpointError where there is nothing to go on from.
    """
    load, output = checkpoint.load, checkpoint.output
    if resume == "auto":
        if load is not None:
            raise ConfigError("--resume auto finds its checkpoint in --output; leave --load out")
        if output is None:
            raise ConfigError("--resume auto looks for a checkpoint in --output; name the run's folder with it")
        return latest_whole(output / CHECKPOINTS)[0]
    if load is None:
        return None
    folder = latest(load) or latest(load / CHECKPOINTS)
    if folder is None and holds_run(load):
        raise CheckpointError(
            f"--load {load} holds no checkpoint, so there is nothing to go on from; begin it anew by --output {load} "
            "--resume auto, which keeps its rows aside"
        )
    if folder is None:
        raise CheckpointError(f"--load {load} is neither a run folder nor a checkpoint; give one of those")
    return folder


def find_start(config: ConfigT, *, stage: str) -> Start:
    """How to take up the run that ``config`` asks for.

    Raises ConfigError where it would write over another run or go on as another one, CheckpointError for a checkpoint
    that cannot be gone on from.
    """
    flags, change = config.checkpoint, config.run.change
    check_changes(config, change)
    folder = checkpoint_of(flags, resume=config.run.resume)
    if folder is None:
        if flags.output is not None and holds_run(flags.output) and config.run.resume != "auto":
            raise ConfigError(
                f"--output {flags.output} holds an earlier run; go on with it by --load {flags.output}, or give "
                "another folder"
            )
        anew = flags.output is not None and holds_run(flags.output)
        return Start(flags.output, uuid.uuid4().hex, begins_anew=anew)
    saved = SavedRun.read(folder, stage=stage)
    home = run_of(folder)
    named_run = flags.load is not None and any(_same(home, one) for one in (flags.load, flags.load.parent))
    own = home if named_run and flags.load is not None and flags.load.name != folder.name else None
    output = flags.output or own
    damaged: Mapping[Path, str] = {}
    if output is not None and config.run.resume == "auto":
        _, damaged = latest_whole(output / CHECKPOINTS)
    elif output is not None:
        _check_output(output, saved, stage=stage)
    if output is not None:
        read_record(output / RECORD)
    before = saved.config(type(config)())
    lines = [
        f"passed over a damaged checkpoint, which is kept as {set_aside(path)}: {why}" for path, why in damaged.items()
    ]
    if before is not None:
        lines += check_resume(before, config, change=change, where=str(flags.load or output))
    goes_on_there = output is not None and _same(home, output)
    run = saved.run if goes_on_there and saved.run is not None else uuid.uuid4().hex
    return Start(output, run, saved, lines, damaged=tuple(damaged))


def set_aside(damaged: Path) -> Path:
    """Where a damaged checkpoint is kept, under a name that no checkpoint has."""
    return damaged.with_name(f"damaged-{damaged.name}")


def settle(config: ConfigT, start: Start) -> None:
    """Write down how the run was configured, once all that could refuse it has been passed. For the main rank.

    What an earlier part was configured with stays: a part that differs has a file of its own, named after its first
    step.
    """
    output = config.checkpoint.output
    assert output is not None, "a run that has begun has a folder"
    kept = without_command(config)
    newest = newest_config(output)
    step = 0 if start.saved is None else int(start.saved.state["step"])
    if newest is None:
        save(kept, output / CONFIG)
    elif differences(_read_or(newest, type(config)()), kept):
        save(kept, output / f"{CONFIG.removesuffix('.yaml')}-step_{step:06d}.yaml")


def _read_or(path: Path, other: ConfigT) -> ConfigT:
    """The configuration in a file that a run wrote, or ``other`` where this version, or stage, cannot read it."""
    try:
        return merge(other, read_yaml(path))
    except ConfigError:
        return other


def _check_output(output: Path, saved: SavedRun, *, stage: str) -> None:
    """Raise where ``output`` holds another run than ``saved``, or newer checkpoints of it."""
    newest = latest(output / CHECKPOINTS)
    if newest is None:
        if holds_run(output) and not _same(run_of(saved.folder), output):
            raise ConfigError(f"--output {output} holds rows of another run; give another folder")
        return
    if SavedRun.read(newest, stage=stage).run != saved.run:
        raise CheckpointError(
            f"{saved.folder} and {newest} were saved by two runs, which must not be mixed in {output}; give another "
            "--output, or go on from a checkpoint of the run that lies there"
        )
    if newest.name > saved.folder.name:
        raise CheckpointError(f"{newest} is newer than --load {saved.folder}; remove it, or give another --output")


def _same(one: Path | None, other: Path) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)


def without_command(config: ConfigT) -> ConfigT:
    """The configuration without what belongs to one command and not to the run, such as ``--load``."""
    plain: ConfigT = type(config)()
    for field in fields_of(plain):
        if field.on_resume is OnResume.COMMAND:
            config = _with(config, field.path, field.value)
    return config


def _with(config: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of the nested ``config`` with ``value`` at ``path``."""
    name, *rest = path
    return replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})


def _named(yaml: Mapping[str, Any], section: str, name: str) -> Any:
    inner = yaml.get(section)
    return inner.get(name) if isinstance(inner, Mapping) else None


def _path(yaml: Mapping[str, Any], section: str, name: str) -> Path | None:
    value = _named(yaml, section, name)
    return Path(value) if isinstance(value, str) else None
