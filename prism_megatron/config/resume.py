"""A run that goes on is the one that was begun: what differs is said, what would train something else is refused."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.fields import OnResume, fields_of
from prism_megatron.errors import ConfigError

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Difference:
    """One field that a run goes on with another value of."""

    flag: str
    before: Any
    now: Any
    on_resume: OnResume

    @property
    def name(self) -> str:
        """As ``--change`` takes it."""
        return changeable(self.flag)

    def __str__(self) -> str:
        return f"{self.flag} was {_shown(self.before)} and is {_shown(self.now)}"


def changeable(flag: str) -> str:
    """A flag as ``--change`` names it: ``--policy.min-lr-ratio``, however it is spelled, is ``policy.min-lr-ratio``."""
    return flag.lstrip("-").replace("_", "-")


def differences(before: ConfigT, now: ConfigT) -> list[Difference]:
    """Fields with other values, but for those that belong to one command, such as ``--load``."""
    return [
        Difference(new.flag, old.value, new.value, new.on_resume or OnResume.FIXED)
        for old, new in zip(fields_of(before), fields_of(now), strict=True)
        if _another(old.value, new.value) and new.on_resume is not OnResume.COMMAND
    ]


def check_changes(config: object, change: Sequence[str]) -> None:
    """Raise ConfigError for a ``--change`` of what is no flag, or of one that needs no leave."""
    classes = {changeable(field.flag): field.on_resume for field in fields_of(config)}
    for name in map(changeable, change):
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5) or sorted(classes)
            raise ConfigError(f"--change {name}: there is no such flag; did you mean {', '.join(near)}?")
        if classes[name] is not OnResume.FIXED:
            raise ConfigError(f"--change {name} is not needed: a run may go on with another --{name}; leave it out")


def check_resume(before: ConfigT, now: ConfigT, *, change: Sequence[str], where: str) -> list[str]:
    """What differs, a line each. ``before`` is what ``where`` was saved with.

    Raises ConfigError, naming them all, for differences that would train something else and that ``change`` leaves out.
    """
    check_changes(now, change)
    found = differences(before, now)
    allowed = set(map(changeable, change))
    refused = [one for one in found if one.on_resume is OnResume.FIXED and one.name not in allowed]
    if refused:
        raise ConfigError(
            f"{where} would go on as another run: {'; '.join(map(str, refused))}. Leave "
            f"{' and '.join(one.flag for one in refused)} out, or ask for it by --change "
            f"{' '.join(one.name for one in refused)}"
        )
    return [*map(str, found), *_stretched(found, now)]


def _stretched(found: Sequence[Difference], now: object) -> Iterator[str]:
    """What another number of steps does to the learning rates that are still to come."""
    for one in found:
        if one.on_resume is not OnResume.LONGER:
            continue
        for role, optimizer in _optimizers(now):
            if optimizer.schedule != "constant" or (optimizer.warmup_ratio and not optimizer.warmup_steps):
                yield (
                    f"the {optimizer.schedule} schedule of {role} now spans {_shown(one.now)} steps: its learning "
                    f"rates from here on are not those that were planned over {_shown(one.before)}"
                )


def _optimizers(config: object) -> Iterator[tuple[str, OptimizerConfig]]:
    assert dataclasses.is_dataclass(config)
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, OptimizerConfig):
            yield item.name.removesuffix("_optimizer"), value


def _another(before: Any, now: Any) -> bool:
    """Whether a value is another one; a folder that is spelled otherwise is not."""
    if isinstance(before, tuple) and isinstance(now, tuple):
        return len(before) != len(now) or any(map(_another, before, now))
    if isinstance(before, Path) and isinstance(now, Path):
        return os.path.realpath(before) != os.path.realpath(now)
    return bool(before != now)


def _shown(value: Any) -> str:
    """On one line, whatever it holds."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "nothing"
    text = f"{value!r}" if isinstance(value, float) else repr(str(value))[1:-1]
    text = text.removesuffix(".0")
    return text if len(text) <= 60 else f"{text[:57]}..."
