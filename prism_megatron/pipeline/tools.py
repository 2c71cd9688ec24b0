"""What a pipeline knows of the tools that play its stages; ``commands/pipeline.py`` names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from prism_megatron.config.fields import OnResume, fields_of
from prism_megatron.evaluation.view import StageView

Way = tuple[str, ...]
"""Names of sections and field, from the outermost inwards."""
Kind = Literal["policy", "discriminator", "prompts", "answers"]
"""What one stage makes and another one starts from."""


class Parse(Protocol):
    """A command's ``parse``."""

    def __call__(self, argv: Sequence[str], /) -> Any: ...


@dataclass(frozen=True)
class Tool:
    """One tool of users, as its command has it."""

    name: str
    """as a pipeline's file says it"""
    command: Sequence[str]
    """the words after the Python interpreter, or after a launcher"""
    fresh: Callable[[], Any]
    """its configuration with field defaults"""
    parse: Parse
    check: Callable[[Any], None]
    inputs: Mapping[Way, Kind]
    """the fields that may name what an earlier stage has made"""
    makes: Mapping[Kind, str | None]
    """what a later stage may use of it: the file in its folder, or None for the folder itself"""
    policy_steps: Callable[[Any], int | None] | None = None
    """of a configuration whose policy is trained: how many steps do that, None where that is not known beforehand"""
    mini_policy: Callable[[Any], Path] | None = None
    """the policy that a configuration without a model starts from"""
    view: StageView | None = None
    """how its rows are shown; None for a tool without rows"""
    resume: Sequence[str] = ("--resume", "auto")
    """what has it go on; empty for one that always does"""
    chosen_by: Sequence[Way] = ()
    """fields that change what comes out of the same folder, and nothing that was computed for it"""

    @property
    def trains_a_policy(self) -> bool:
        return "policy" in self.makes

    def way_of(self, kind: Kind) -> Way | None:
        """The field that names what it starts from of that kind."""
        return next((way for way, own in self.inputs.items() if own == kind), None)

    def commands_own(self) -> list[Way]:
        """Fields that belong to one command: of these the pipeline decides."""
        return [field.path for field in fields_of(self.fresh()) if field.on_resume is OnResume.COMMAND]


def value_at(values: Any, way: Way) -> Any:
    """What stands there in nested mappings or dataclasses; None where nothing does."""
    for name in way:
        values = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
        if values is None:
            return None
    return values


def nested(way: Way, value: Any) -> dict[str, Any]:
    """``value`` in nested mappings."""
    for name in reversed(way):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def put_at(values: dict[str, Any], way: Way, value: Any) -> None:
    """Set it in nested mappings, which are made where they are missing."""
    for name in way[:-1]:
        values = values.setdefault(name, {})
    values[way[-1]] = value
