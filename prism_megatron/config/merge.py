"""Between nested frozen dataclasses and plain YAML, strictly: an unknown key or a wrong type is a ConfigError."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from prism_megatron.config.yaml_file import Section, write_yaml
from prism_megatron.disk import write_atomically
from prism_megatron.errors import ConfigError

ConfigT = TypeVar("ConfigT")

_MAX_SHOWN = 200


def merge(base: ConfigT, values: Mapping[str, Any], *, where: str = "") -> ConfigT:
    """A copy of the dataclass ``base`` with the nested ``values`` in place of its own.

    Raises ConfigError for a key that is not a field, naming the nearest ones, for a value of another type and for a
    number that is not finite; of a file's :class:`Section` it says the line.
    """
    assert dataclasses.is_dataclass(base) and not isinstance(base, type)
    types_of = get_type_hints(type(base))
    hints = {item.name: types_of[item.name] for item in dataclasses.fields(base)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        place = f"{values.place(key)}: " if isinstance(values, Section) else ""
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=3, cutoff=0.5) or sorted(hints)
            raise ConfigError(
                f"{place}unknown key {name!r}; did you mean {', '.join(where + known for known in near)}?"
            )
        changes[key] = _coerce(value, hints[key], name, place, getattr(base, key))
    return dataclasses.replace(base, **changes)


def _coerce(value: Any, hint: Any, name: str, place: str, current: Any = None) -> Any:
    """``place`` is where the value stands; ``current`` is the section that the values of one go over, if there is one.

    A section that is one of a list, or that was None, is made of its defaults.
    """
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        section: Any = hint() if current is None else current  # type: ignore[operator]  # of a class
        return _section(value, section, name, place)
    if origin is Literal:
        return _choice(value, get_args(hint), f"{place}{name}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{place}{name} must be a list, not {_shown(value)}")
        return tuple(_coerce(item, get_args(hint)[0], f"{name}[{i}]", place) for i, item in enumerate(value))
    if origin in (Union, types.UnionType):
        members = get_args(hint)
        if value is None and type(None) in members:
            return None
        (member,) = (member for member in members if member is not type(None))
        return _coerce(value, member, name, place, current)
    return _single(value, hint, f"{place}{name}")


def _section(value: Any, current: Any, name: str, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{place}{name} must hold keys with values, not {_shown(value)}")
    return merge(current, value, where=f"{name}.")


def _choice(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    # YAML 1.1 reads a bare on or off as a truth value.
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    if text in choices:
        return text
    raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, not {_shown(value)}")


def _single(value: Any, hint: Any, name: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _number(value, name)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    advice = f"; {_ADVICE[hint]}" if hint in _ADVICE else ""
    raise ConfigError(f"{name} must be {hint.__name__}, not {_shown(value)}{advice}")


_ADVICE = {
    str: "put it in quotes",
    Path: "put it in quotes",
    int: "write a whole number in digits",
    float: "write a number in digits",
    bool: "write true or false",
}


def _number(value: float | str, name: str) -> float:
    # YAML 1.1 reads 1e-6, without a dot, as text.
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{name} must be a number, not {_shown(value)}; {_ADVICE[float]}") from error
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be a finite number, not {_shown(value)}; {_ADVICE[float]}")
    return number


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def to_plain(config: object) -> dict[str, Any]:
    """Nested dicts of plain values; ``merge`` of them over any config of that class gives an equal one."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    return {item.name: _plain_value(getattr(config, item.name)) for item in dataclasses.fields(config)}


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, tuple):
        return tuple(map(_plain_value, value))
    return str(value) if isinstance(value, Path) else value


def to_yaml(config: object) -> str:
    """The resolved config as the YAML that ``--config`` reads."""
    return write_yaml(to_plain(config))


def save(config: object, path: Path) -> None:
    """Write the resolved config; a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_yaml(config))
