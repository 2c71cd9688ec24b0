"""The wrong edits that tests have to notice, read from the TOML files of this folder.

Example of one entry::

    [[defect]]
    name = "clip bounds are swapped"
    file = "prism_megatron/losses/policy/clipped.py"
    old = "ratio.clamp(1 - clip_low, 1 + clip_high)"
    new = "ratio.clamp(1 - clip_high, 1 + clip_low)"
    claim = "the lower bound limits falling ratios, the upper one rising ratios"
    tests = ["tests/unit/losses/policy/test_clipped.py::test_clip_bounds_have_their_sides"]

``old`` stands exactly once in ``file``, which may be a script or YAML too. Every one of ``tests`` has to fail once
``new`` stands in its place. An entry with ``equivalent = "why"`` changes nothing that can be observed; its tests have
to pass.
"""

from __future__ import annotations

import ast
import functools
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


class CatalogueError(ValueError):
    """An entry that cannot be used; the message names it and says what is wrong."""


@dataclass(frozen=True)
class Defect:
    """One wrong edit, what it breaks, and who has to notice."""

    name: str
    file: str
    old: str
    new: str
    claim: str = ""
    """what the right code does, in the words of somebody who relies on it"""
    tests: tuple[str, ...] = ()
    """pytest node ids, or their beginnings up to a ``[`` or ``::``"""
    equivalent: str = ""
    """why nothing can tell the edit from the original; empty for a real defect"""

    def edited(self, root: Path) -> str:
        """The text of ``file`` below ``root`` with the edit made. Raises CatalogueError where it does not apply."""
        path = root / self.file
        if not path.is_file():
            raise CatalogueError(f"{self.name}: {self.file} does not exist; name the file that the code moved to")
        text = path.read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise CatalogueError(f"{self.name}: the text to replace stands {found} times in {self.file}, not once")
        wrong = text.replace(self.old, self.new)
        if path.suffix != ".py":
            return wrong
        try:
            same = _code(text) == ast.dump(ast.parse(wrong))
        except SyntaxError as error:
            raise CatalogueError(f"{self.name}: {self.file} is no Python any more after the edit: {error}") from None
        if same:
            raise CatalogueError(f"{self.name}: the edit changes no code in {self.file}")
        return wrong

    def line(self, root: Path) -> int:
        """The line at which ``old`` begins, counted from 1."""
        return (root / self.file).read_text(encoding="utf-8").partition(self.old)[0].count("\n") + 1


@functools.cache
def _code(text: str) -> str:
    return ast.dump(ast.parse(text))


def load(folder: Path = FOLDER) -> list[Defect]:
    """All entries of the folder's TOML files, by file name. Raises CatalogueError for a malformed or doubled one."""
    defects: list[Defect] = []
    for path in sorted(folder.glob("*.toml")):
        defects += [_defect(entry, path) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["defect"]]
    for what in ("name", "edit"):
        seen: set[str] = set()
        for defect in defects:
            key = defect.name if what == "name" else f"{defect.file}\n{defect.old}\n{defect.new}"
            if key in seen:
                raise CatalogueError(f"{defect.name}: another entry has the same {what}")
            seen.add(key)
    return defects


def _defect(entry: dict[str, object], path: Path) -> Defect:
    name = entry.get("name", "an entry without a name")
    if unknown := entry.keys() - {field.name for field in fields(Defect)}:
        raise CatalogueError(f"{path.name}: {name}: unknown keys: {', '.join(sorted(unknown))}")
    texts = {key: value for key, value in entry.items() if isinstance(value, str)}
    if missing := {"name", "file", "old", "new", "claim"} - texts.keys():
        raise CatalogueError(f"{path.name}: {name}: {', '.join(sorted(missing))} must be given as text")
    tests = entry.get("tests", [])
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise CatalogueError(f"{path.name}: {name}: tests must be a list of node ids")
    if not tests and "equivalent" not in texts:
        raise CatalogueError(f"{path.name}: {name}: name the tests that must fail, or say why it is equivalent")
    return Defect(**texts, tests=tuple(tests))
