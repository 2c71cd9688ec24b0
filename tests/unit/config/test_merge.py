"""Lists of sections, and sections that may be none: values, complaints with their line, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest

from prism_megatron.config.fields import AT_LEAST_ONE, check_fields, fields_of
from prism_megatron.config.merge import merge, to_plain, to_yaml
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class Leaf:
    name: str = ""
    count: Annotated[int, AT_LEAST_ONE] = 1


@dataclass(frozen=True)
class Branch:
    leaves: tuple[Leaf, ...] = ()
    first: Leaf = field(default_factory=lambda: Leaf("one", 2))


@dataclass(frozen=True)
class Tree:
    branches: tuple[Branch, ...] = ()
    may: Branch | None = None
    folders: tuple[Path, ...] = ()


TEXT = """\
branches:
- leaves: [{name: a}, {name: b, count: 3}]
- first: {count: 7}
may:
  leaves:
  - {count: 4}
folders: [x]
"""
WANTED = Tree(
    branches=(Branch((Leaf("a"), Leaf("b", 3))), Branch(first=Leaf("one", 7))),
    may=Branch((Leaf(count=4),)),
    folders=(Path("x"),),
)


def read(tmp_path: Path, text: str) -> Tree:
    path = tmp_path / "tree.yaml"
    path.write_text(text, encoding="utf-8")
    return merge(Tree(), read_yaml(path))


def test_sections_in_lists_are_read(tmp_path: Path) -> None:
    """Claim: each is made of its defaults with its values over them, at any depth."""
    assert read(tmp_path, TEXT) == WANTED


def test_a_section_that_is_there_may_become_none(tmp_path: Path) -> None:
    assert merge(WANTED, {"may": None}).may is None
    changed = merge(WANTED, {"may": {"first": {"name": "z"}}}).may
    assert changed == Branch((Leaf(count=4),), Leaf("z", 2)), "values go over those that were there"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Claim: to_yaml and to_plain are inverted by merge, sections in lists and missing ones included."""
    for tree in (WANTED, Tree()):
        assert read(tmp_path, to_yaml(tree)) == tree
        assert merge(Tree(), to_plain(tree)) == tree
        assert merge(WANTED, to_plain(tree)) == tree, "whatever it goes over"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("branches:\n- leaves:\n  - {name: a}\n  - {nam: b}\n",
         r"tree.yaml, line 4: unknown key 'branches\[0\]\.leaves\[1\]\.nam'; did you mean branches"),
        ("may:\n  leaves:\n  - count: many\n", r"tree.yaml, line 3: may\.leaves\[0\]\.count must be int, not 'many'"),
        ("branches: [3]\n", r"tree.yaml, line 1: branches\[0\] must hold keys with values, not 3"),
        ("branches: {leaves: []}\n", r"tree.yaml, line 1: branches must be a list"),
        ("may: 3\n", r"tree.yaml, line 1: may must hold keys with values, not 3"),
        ("may:\n  first: null\n", r"tree.yaml, line 2: may\.first must hold keys with values, not None"),
    ],
)  # fmt: skip
def test_complaints_name_place_and_line(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read(tmp_path, text)


def test_ranges_hold_in_lists_too() -> None:
    """Claim: fields of sections in lists are leaves of their own, with a number in their path."""
    tree = Tree(branches=(Branch(), Branch((Leaf("a"), Leaf("b", 0)))))
    assert [one.path for one in fields_of(tree)][-3:-1] == [("branches", "1", "first", "count"), ("may",)]
    with pytest.raises(ConfigError, match=r"branches\.1\.leaves\.1\.count 0 must be at least 1"):
        check_fields(tree, named=lambda one: ".".join(one.path))
