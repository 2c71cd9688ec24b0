"""Command line of the tools: field defaults, or the mini world's recipe, below ``--config`` below flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args

import tyro

from prism_megatron.config.architecture.model import MiniWorld, ModelConfig
from prism_megatron.config.fields import check_fields
from prism_megatron.config.merge import merge
from prism_megatron.config.yaml_file import read_yaml

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class _CommandLine(Generic[ConfigT]):
    run: Annotated[ConfigT, tyro.conf.arg(name="")]
    config: Path | None = None
    """YAML with the same fields, nested as printed at the start of a run; flags win over it"""


def inputs_named(argv: Sequence[str], *names: str) -> frozenset[str]:
    """Which of these inputs a flag, or else the YAML's field of the same name in the section of that name, gives.

    Raises ConfigError for a bad YAML file.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    for name in names:
        early.add_argument(f"--{name}")
    known, _ = early.parse_known_args(argv)
    yaml = read_yaml(known.config) if known.config else {}

    def is_named(name: str) -> bool:
        in_yaml, flag = yaml.get(name), getattr(known, name)
        field = in_yaml.get(name) if isinstance(in_yaml, Mapping) else None
        return (field if flag is None else flag) not in (None, "None")

    return frozenset(filter(is_named, names))


def named_value(argv: Sequence[str], name: str) -> str | None:
    """What the flag of that name says, or else the YAML's own field; None where neither names it.

    Raises ConfigError for a bad YAML file.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument(f"--{name}")
    known, _ = early.parse_known_args(argv)
    yaml = read_yaml(known.config) if known.config else {}
    value = getattr(known, name) or yaml.get(name)
    return None if value is None else str(value)


def named_mini(argv: Sequence[str], *, section: str | None = "model") -> MiniWorld | None:
    """The mini world that ``--mini`` or the YAML's field of that name, in this section, names; None where neither does.

    One that there is not counts as none: reading all flags refuses it. Raises ConfigError for a bad YAML file.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--mini")
    known, _ = early.parse_known_args(_spell_out_bare(argv))
    yaml = read_yaml(known.config) if known.config else {}
    fields = yaml if section is None else yaml.get(section)
    value = known.mini or (fields.get("mini") if isinstance(fields, Mapping) else None)
    return next((world for world in get_args(MiniWorld) if world == value), None)


def parse_over(defaults: ConfigT, argv: Sequence[str], *, description: str, prog: str | None = None) -> ConfigT:
    """``defaults`` with the YAML of ``--config`` over them, and the flags over both.

    Raises ConfigError for a bad YAML file, and for a value that its field's own rules forbid.
    """
    arguments = _spell_out_bare(argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(arguments)[0].config
    values: Mapping[str, Any] = {} if path is None else read_yaml(path)
    form: Any = _CommandLine[type(defaults)]  # type: ignore[misc]  # the class is known at run time only
    default = _CommandLine(run=merge(defaults, values), config=path)
    command: _CommandLine[ConfigT] = tyro.cli(form, default=default, args=arguments, description=description, prog=prog)
    check_fields(command.run)
    return command.run


def parse_flags(defaults: ConfigT, argv: Sequence[str], *, description: str) -> ConfigT:
    """``defaults`` with the flags over them, where no YAML has the same fields.

    Raises ConfigError for a value that its field's own rules forbid.
    """
    config: ConfigT = tyro.cli(type(defaults), default=defaults, args=list(argv), description=description)
    check_fields(config)
    return config


_BARE = {"--sp": "on", "--mini": ModelConfig().mini}
"""What flags mean that may stand without a value."""


def _spell_out_bare(argv: Sequence[str]) -> list[str]:
    """With the value of each flag that stands without one."""
    arguments: list[str] = []
    for position, argument in enumerate(argv):
        arguments.append(argument)
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        if argument in _BARE and following.startswith("-"):
            arguments.append(_BARE[argument])
    return arguments
