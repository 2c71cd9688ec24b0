"""The configuration of ``prism-drift``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from prism_megatron.config.fields import NOT_NEGATIVE, Range, check_fields
from prism_megatron.errors import ConfigError

_LINES_OF = {"answers.jsonl": "an evaluation", "data.jsonl": "a record set"}


class Named(NamedTuple):
    """A set of responses and what it is called. ``place`` is a file, or the folder of a set of demonstrations."""

    name: str
    place: Path


@dataclass(frozen=True)
class DriftConfig:
    """How far are responses from those of others, in form, in words and in length (docs/drift.md)?"""

    responses: tyro.conf.Positional[Path] = Path()
    """JSON lines of id and response, or of id, caption, think and answer; the folder of an evaluation or of a record
    set, or demonstrations in any format that prism-sft tells by itself, do as well"""
    against: tuple[str, ...] = ()
    """what they are compared with, each on its own: NAME=SET, such as base=base.jsonl"""
    mode: Literal["greedy", "sampled"] = "greedy"
    """which answers of an evaluation count"""
    embeddings: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder with one tokenizer (*.json) and one table of embeddings (*.safetensors); without it those of the installed
    wordllama, and where that is not installed distances of embeddings are left out"""
    output: Path | None = None
    """JSON file of all figures"""
    permutations: Annotated[int, Range(at_least=19)] = 999
    """relabellings by which a p-value is found; the smallest is 1 / (1 + PERMUTATIONS)"""
    most: Annotated[int, Range(at_least=20)] = 2000
    """responses of each set that are compared; of more so many are drawn"""
    seed: Annotated[int, NOT_NEGATIVE] = 42
    """keys draws and relabellings"""

    @property
    def sets(self) -> tuple[Named, ...]:
        """Those of ``--against``. Raises ConfigError for one that has no name, or the name of another."""
        found: dict[str, Named] = {}
        for text in self.against:
            name, equals, path = text.partition("=")
            if not (name and equals and path):
                raise ConfigError(f"--against {text}: write NAME=SET, such as base=base.jsonl")
            if name in found:
                raise ConfigError(f"--against {text}: another set is called {name!r} too; give it another name")
            found[name] = Named(name, place_of(Path(path)))
        return tuple(found.values())


def file_of(path: Path) -> Path:
    """The file of lines that ``path`` names: itself, or the one in a folder. Raises ConfigError."""
    if path.is_file():
        return path
    for name in _LINES_OF:
        if (path / name).is_file():
            return path / name
    kinds = " or ".join(f"{kind}'s folder, with {name}" for name, kind in _LINES_OF.items())
    raise ConfigError(f"{path} is no file of responses; name one of JSON lines, or {kinds}")


def place_of(path: Path) -> Path:
    """As :func:`file_of`; a folder without such a file may be a set of demonstrations. Raises ConfigError."""
    return path if path.is_dir() and not any((path / name).is_file() for name in _LINES_OF) else file_of(path)


def check_drift(config: DriftConfig) -> None:
    """Raise ConfigError for what cannot work."""
    check_fields(config)
    if config.responses == Path():
        raise ConfigError("name the responses that are compared: a file of JSON lines, an evaluation's folder or a set")
    place_of(config.responses)
    if not config.sets:
        raise ConfigError("--against is needed: name what to compare with, such as base=base.jsonl")
    if config.embeddings is not None and not config.embeddings.is_dir():
        raise ConfigError(f"--embeddings {config.embeddings} is not a folder; name one with *.json and *.safetensors")
    if config.output is not None and config.output.is_dir():
        raise ConfigError(f"--output {config.output} is a folder; name a file, such as drift.json")
