"""What stands beside a field of a configuration: the values it may have, and whether a run may go on with another.

``steps: Annotated[int, AT_LEAST_ONE, OnResume.LONGER]``: at least 1, and a run that goes on may have more of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from prism_megatron.errors import ConfigError

_NO_PREFIX = get_args(tyro.conf.OmitArgPrefixes[int])[1]
_SPELLING: type[Any] = type(tyro.conf.arg(name="x"))


class OnResume(Enum):
    """What a run that goes on may do to a field; a section's ``ON_RESUME`` stands for those fields that say nothing."""

    FIXED = "changes what is trained: refused, unless --change names it"
    LONGER = "may grow, and the run says what that does"
    FREE = "changes how the run is kept, split or watched, and nothing that is trained"
    COMMAND = "belongs to one command, and not to the run"


@dataclass(frozen=True)
class Range:
    """The bounds of a number; None, where a field may be that, lies in every range, and a NaN or an infinity in none.

    Example: ``top_p: Annotated[float, Range(above=0.0, at_most=1.0)] = 1.0``.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    remark: str = ""
    """what a complaint adds to the bounds"""

    def check(self, flag: str, value: float) -> None:
        """Raise ConfigError, naming ``flag``, for a value outside the bounds."""
        # Written so that a NaN fails every bound.
        bounds = (
            (self.at_least, self.at_least is None or value >= self.at_least, "at least"),
            (self.above, self.above is None or value > self.above, "above"),
            (self.at_most, self.at_most is None or value <= self.at_most, "at most"),
            (self.below, self.below is None or value < self.below, "below"),
        )
        if not all(holds for _, holds, _ in bounds) or not math.isfinite(value):
            wanted = " and ".join(f"{word} {bound:g}" for bound, _, word in bounds if bound is not None)
            shown = f"{value:g}" if isinstance(value, float) else value
            raise ConfigError(f"{flag} {shown} must be {wanted}{self.remark}")


@dataclass(frozen=True)
class ExistingFolder:
    """A folder that must be there, where one is named."""

    def check(self, flag: str, value: object) -> None:
        """Raise ConfigError, naming ``flag``, for anything but a folder."""
        if not Path(str(value)).is_dir():
            raise ConfigError(f"{flag} {value} is not a folder; give one that exists, or leave {flag} out")


AT_LEAST_ONE = Range(at_least=1)
NOT_NEGATIVE = Range(at_least=0)
POSITIVE = Range(above=0)
SHARE = Range(at_least=0, at_most=1)
ZERO_IS_OFF = Range(at_least=0, remark=", which turns it off")


@dataclass(frozen=True)
class Field:
    """One leaf of a configuration."""

    path: tuple[str, ...]
    """names from the outermost section inwards, as in the YAML; of a section in a list its number, from 0"""
    flag: str
    """as typed, such as ``--discriminator.lr``"""
    value: Any
    rules: tuple[Any, ...]
    """what its annotation says beside the type"""
    on_resume: OnResume | None
    """None for a field that neither its annotation nor its section speaks for"""


@dataclass(frozen=True)
class _Slot:
    name: str
    spelled: str
    prefixed: bool
    rules: tuple[Any, ...]
    on_resume: OnResume | None


def fields_of(config: object) -> list[Field]:
    """All leaves of a nested configuration, in the order in which they are declared."""
    return list(_walk(config, path=(), prefix=""))


def check_fields(config: object, *, named: Callable[[Field], str] = lambda field: field.flag) -> None:
    """Raise ConfigError for the first field whose value its own annotation rules out; ``named`` names it."""
    for field in fields_of(config):
        for rule in field.rules:
            if isinstance(rule, Range | ExistingFolder) and field.value is not None:
                rule.check(named(field), field.value)


def _walk(config: object, *, path: tuple[str, ...], prefix: str) -> Iterator[Field]:
    form: Any = type(config)
    for slot in _slots(form):
        value = getattr(config, slot.name)
        here = (*path, slot.name)
        inner = f"{prefix}{slot.spelled}." if slot.prefixed else prefix
        if dataclasses.is_dataclass(value):
            yield from _walk(value, path=here, prefix=inner)
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for number, one in enumerate(value):
                yield from _walk(one, path=(*here, str(number)), prefix=f"{inner}{number}.")
        else:
            yield Field(here, f"--{prefix}{slot.spelled}", value, slot.rules, slot.on_resume)


@cache
def _slots(form: type) -> tuple[_Slot, ...]:
    hints = get_type_hints(form, include_extras=True)
    section: OnResume | None = getattr(form, "ON_RESUME", None)
    return tuple(_slot(item.name, hints[item.name], section) for item in dataclasses.fields(form))


def _slot(name: str, hint: Any, section: OnResume | None) -> _Slot:
    rules = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    named = [rule.name for rule in rules if isinstance(rule, _SPELLING) and rule.name is not None]
    own: list[OnResume | None] = [rule for rule in rules if isinstance(rule, OnResume)]
    spelled = (named or [name])[0].replace("_", "-")
    return _Slot(name, spelled, _NO_PREFIX not in rules, rules, (own or [section])[0])
