"""Typed reading of a JSON object that others wrote: every complaint names the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from prism_megatron.errors import ConfigError


class Section:
    """One JSON object. ``read`` names the keys that were asked for, whether they are there or not."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """``where`` begins every message."""
        self.values = values
        self.where = where
        self.read: set[str] = set()

    def get(self, *names: str) -> Any:
        """The value under any of its ``names``; None where none is there, or all are null.

        Raises ConfigError where two names have different values.
        """
        self.read.update(names)
        found = [(name, value) for name in names if (value := self.values.get(name)) is not None]
        for name, value in found:
            if value != found[0][1]:
                raise ConfigError(
                    f"{self.where}: {found[0][0]} is {found[0][1]!r} but {name} is {value!r}; they are two names of "
                    "one setting, so remove the wrong one"
                )
        return found[0][1] if found else None

    def _typed(self, kind: type[int | float | str | bool | dict[str, Any]], *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            spelled = " or ".join(repr(name) for name in names)
            raise ConfigError(f"{self.where}: key {spelled} is missing; class defaults are not used, so write it out")
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self.where}: key {names[0]!r} is {value!r}, expected {kind.__name__}")
        return value

    def integer(self, *names: str) -> int:
        """A whole number of at least 0. Raises ConfigError for anything else, and where it is missing."""
        value = int(self._typed(int, *names))
        if value < 0:
            raise ConfigError(f"{self.where}: key {names[0]!r} is {value}, expected a count or an id of at least 0")
        return value

    def size(self, *names: str) -> int:
        """A whole number of at least 1. Raises ConfigError for anything else, and where it is missing."""
        if (value := self.integer(*names)) == 0:
            raise ConfigError(f"{self.where}: key {names[0]!r} is 0, expected a positive size")
        return value

    def number(self, *names: str) -> float:
        """Raises ConfigError for what is no number, and where it is missing."""
        return float(self._typed(float, *names))

    def text(self, *names: str) -> str:
        """Raises ConfigError for what is no text, and where it is missing."""
        return str(self._typed(str, *names))

    def flag(self, *names: str) -> bool:
        """Raises ConfigError for what is neither true nor false, and where it is missing."""
        return bool(self._typed(bool, *names))

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers of at least 0. Raises ConfigError for anything else, and where it is missing."""
        value = self._typed(list, name)  # type: ignore[arg-type]  # list is no scalar kind, and is checked alike
        if not all(type(item) is int and item >= 0 for item in value):
            raise ConfigError(f"{self.where}: key {name!r} is {value!r}, expected a list of integers")
        return tuple(value)

    def section(self, name: str) -> Self:
        """The object under ``name``. Raises ConfigError for anything else, and where it is missing."""
        return type(self)(self._typed(dict, name), f"{self.where}: {name}")

    def expect(self, name: str, *wanted: object) -> None:
        """Refuse a variant that our model does not compute: the key is absent or has one of the values ``wanted``.

        Raises ConfigError. 0 and 1 stand for no flag.
        """
        self.read.add(name)
        value = self.values.get(name, wanted[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in wanted):
            raise ConfigError(f"{self.where}: {name} is {value!r}; only {wanted[0]!r} is supported")
