"""Megatron-Energon's ``.nv-meta`` folder beside WebDataset shards: which shards are which part of the set.

Energon 7 writes ``.info.json``, older versions ``.info.yaml``; both hold the number of samples of every shard.
``split.yaml`` names the shards of each part. Names may be collapsed: ``shard_{000..127}.tar``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from prism_megatron.errors import DataError

META = ".nv-meta"
INFO_FILES = (".info.json", ".info.yaml")
SPLIT_FILES = ("split.yaml", "split.json")
ALL = "all"
"""stands for all parts of the split together"""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES = 10**6


@dataclass(frozen=True)
class EnergonMeta:
    """The metadata of the set in ``folder``."""

    folder: Path

    def shards(self, part: str) -> tuple[Path, ...]:
        """The tars of a part, in order. Raises DataError for one that is missing, or for metadata that is damaged."""
        parts = self._split.get("split_parts")
        names = parts if isinstance(parts, dict) else {}
        wanted = list(names) if part == ALL else [part]
        if not names or any(not isinstance(names.get(name), list) for name in wanted):
            known_parts = ", ".join(map(str, names)) or "none"
            raise DataError(
                f"{self.folder / META}: part {part!r} of the split is not there; --split {known_parts} or {ALL}"
            )
        known = self.counts()
        root = self.folder.resolve()
        found, excludes = [], frozenset(self.excludes)
        where = f"{self.folder / META}: split_parts"
        for name in [shard for each in wanted for shard in _expanded(names[each], where)]:
            if name in excludes:
                continue
            path = self.folder / name
            try:
                is_inside = not PurePosixPath(name).is_absolute() and path.resolve().is_relative_to(root)
            except (OSError, ValueError, RuntimeError):  # no name of a file; a loop of links, before Python 3.13
                is_inside = False
            if not is_inside:
                raise DataError(f"{self.folder / META}: shard {name!r} is not inside {root}")
            if name not in known or not path.is_file():
                raise DataError(f"{path}: named by {META} and not there, or not counted; prepare the set again")
            found.append(path)
        if not found:
            raise DataError(f"{self.folder / META}: part {part!r} of the split has no shards")
        return tuple(found)

    def excluded(self, shard: Path) -> frozenset[str]:
        """Keys of samples that the split leaves out of a shard. Raises DataError for damaged metadata."""
        name = shard.relative_to(self.folder).as_posix()
        return frozenset(entry.removeprefix(f"{name}/") for entry in self.excludes if "/" in entry)

    def counts(self) -> dict[str, int]:
        """Samples of every shard by its name. Raises DataError."""
        info = _first(self.folder, INFO_FILES)
        counts = info.get("shard_counts")
        if not isinstance(counts, dict) or not all(
            isinstance(name, str) and isinstance(count, int) and count >= 0 for name, count in counts.items()
        ):
            raise DataError(f"{self.folder / META}: shard_counts must give a number for every shard; prepare it again")
        return dict(counts)

    @property
    def _split(self) -> dict[str, Any]:
        return _first(self.folder, SPLIT_FILES)

    @property
    def excludes(self) -> tuple[str, ...]:
        """Names of shards, and of samples as ``SHARD/KEY``, that are left out. Raises DataError."""
        return tuple(sorted(set(_expanded(self._split.get("exclude") or [], f"{self.folder / META}: exclude"))))


def _first(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        path = folder / META / name
        if path.is_file():
            return _read(path, path.stat().st_mtime_ns)
    raise DataError(f"{folder / META}: none of {', '.join(names)} is there; prepare the set again")


@lru_cache(maxsize=32)
def _read(path: Path, _changed: int) -> dict[str, Any]:
    """JSON is YAML, so that one reader does for both."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: keys with values expected")
    return value


def _expanded(names: object, where: str) -> Iterator[str]:
    """``a_{0..2}.tar`` as its three names. Raises DataError for what is no list of texts."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: a list of names expected")
    count = 0
    waiting = list(reversed(names))
    while waiting:
        name = waiting.pop()
        braces = _BRACES.search(name)
        if braces is None:
            count += 1
            yield name
            continue
        choices = _choices(braces[1])
        count += len(choices)
        if count > _MOST_NAMES:
            raise DataError(f"{where}: {name!r} stands for more than {_MOST_NAMES} names")
        waiting.extend(name[: braces.start()] + choice + name[braces.end() :] for choice in reversed(choices))


def _choices(inside: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if bounds is None:
        return inside.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    if abs(last - first) > _MOST_NAMES:
        return [""] * (_MOST_NAMES + 1)  # refused by the count
    step = 1 if last >= first else -1
    width = max(len(bounds[1]), len(bounds[2])) if "0" in (bounds[1][0], bounds[2][0]) else 0
    return [str(number).zfill(width) for number in range(first, last + step, step)]
