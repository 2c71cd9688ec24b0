"""Cases as JSON: a file of them can be read by anyone, and reading it runs nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from prism_megatron.errors import ConfigError
from prism_megatron.forecast.plays import Case
from prism_megatron.training.roles import DTYPES


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """Write a list of objects, one for each case, with every field by its name."""
    path.write_text(json.dumps([dataclasses.asdict(case) for case in cases], default=_named), encoding="utf-8")


def read_cases(path: Path) -> list[Case]:
    """Read what ``write_cases`` wrote. Raises ConfigError, naming the place, for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); give a file of write_cases") from error
    return [_rebuilt(Case, value, f"{path}: case {number}") for number, value in enumerate(values)]


def _named(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"a case has a {type(value).__name__}, which has no form in JSON")


def _rebuilt(kind: Any, value: Any, where: str) -> Any:
    """The value of a field that is declared as ``kind``."""
    if kind is torch.dtype:
        if value not in DTYPES:
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(DTYPES)}")
        return DTYPES[value]
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(value, dict) or not value.keys() <= known:
            raise ConfigError(f"{where} is {value!r}; expected an object with the fields {', '.join(sorted(known))}")
        fields = {name: _rebuilt(hints[name], inner, f"{where}: {name}") for name, inner in value.items()}
        try:
            return kind(**fields)  # type: ignore[operator]  # a class: types are asked about, never instances
        except TypeError as error:
            raise ConfigError(f"{where}: {error}; give every field that has no default") from error
    if get_origin(kind) is tuple:
        inner, *rest = get_args(kind)
        kinds = [inner] * len(value) if rest == [...] else [inner, *rest]
        return tuple(_rebuilt(one, part, where) for one, part in zip(kinds, value, strict=True))
    choices = [one for one in get_args(kind) if one is not NoneType]
    if value is not None and len(choices) == 1 and NoneType in get_args(kind):
        return _rebuilt(choices[0], value, where)
    return value
