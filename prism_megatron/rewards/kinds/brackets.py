"""Tuples, intervals, sets and lists: what the parts are, and in which order they have to come."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from prism_megatron.rewards.answers import plain, split_outside
from prism_megatron.rewards.verdict import GuardedError, NeedsAlgebraError

_COMMA = re.compile(r"\s*,\s*(?:and\s+)?")
_SEMICOLON = re.compile(r"\s*;\s*(?:and\s+)?")
_AND = re.compile(r"\s+(?:and|or|&)\s+|\s*\\(?:text|mathrm)\{\s*(?:and|or)\s*\}\s*")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])")
_NUMBERED = re.compile(r"\(([1-9])\)")
_MEMBER = re.compile(r"(?:[A-Za-z]|\\[a-z]+)\s*(?:\\in\s+|\\in(?=[\[({]))")
_MAX_PARTS = 64
_KEPT_COMMA = "\ue000"  # a private character, which no plain text has


class Bracket(NamedTuple):
    """``(3, -4)`` is ``Bracket("(", ")", ("3", "-4"))``."""

    opens: str
    closes: str
    parts: tuple[str, ...]

    @property
    def kind(self) -> str:
        if self.opens == "{":
            return "set"
        return "tuple" if (self.opens, self.closes) == ("(", ")") else "interval"


def bracket_of(text: str) -> Bracket | None:
    """All of ``text`` as one bracket with parts; a single part in round or square ones is no tuple."""
    found = _MEMBER.match(text)
    text = (text[found.end() :] if found else text).strip()
    for opening, closing in ((r"\{", r"\}"), ("{", "}")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            inner = text[len(opening) : -len(closing)]
            parts = split_outside(inner, _COMMA)
            # Braces without a backslash group in LaTeX, too.
            if _is_balanced(inner) and (opening == r"\{" or len(parts) > 1) and all(parts):
                return Bracket("{", "}", tuple(parts))
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]":
        inner = text[1:-1]
        parts = split_outside(inner, _COMMA)
        if _is_balanced(inner) and len(parts) > 1 and all(parts):
            return Bracket(text[0], text[-1], tuple(parts))
    return None


def values_of(text: str) -> tuple[str, ...]:
    """The values of a list: split at ``(1)``, ``(2)``, …, at semicolons, or at commas and words outside brackets."""
    marks = list(_NUMBERED.finditer(text))
    numbers = [int(mark[1]) for mark in marks]
    if len(marks) > 1 and marks[0].start() == 0 and numbers == list(range(1, len(marks) + 1)):
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        parts = [text[mark.end() : end].strip(" ,;.") for mark, end in zip(marks, ends, strict=True)]
        if all(parts):
            return tuple(parts)
    if len(parts := split_outside(text, _SEMICOLON)) > 1:
        return tuple(parts)
    kept = _THOUSANDS.sub(lambda found: found[0].replace(",", _KEPT_COMMA), text)
    parts = [one for part in split_outside(kept, _COMMA) for one in split_outside(part, _AND)]
    return tuple(part.replace(_KEPT_COMMA, ",") for part in parts)


def same_in_order(answer: tuple[str, ...], gold: tuple[str, ...], same: Callable[[str, str], bool]) -> bool:
    """Whether there are as many parts, each of which is the gold's at its place.

    Raises NeedsAlgebraError, after all parts that need none are the same, where some need it.
    """
    if len(answer) != len(gold) or len(gold) > _MAX_PARTS:
        return False
    waiting: NeedsAlgebraError | None = None
    for one, wanted in zip(answer, gold, strict=True):
        try:
            if not same(_part(one), _part(wanted)):
                return False
        except NeedsAlgebraError as error:
            waiting = error
    if waiting is not None:
        raise waiting
    return True


def same_in_any_order(answer: tuple[str, ...], gold: tuple[str, ...], same: Callable[[str, str], bool]) -> bool:
    """Whether there are as many parts, and each is another one of the gold's."""
    if len(answer) != len(gold) or len(gold) > _MAX_PARTS:
        return False
    left = [_part(wanted) for wanted in gold]
    for one in answer:
        found = next((place for place, wanted in enumerate(left) if same(_part(one), wanted)), None)
        if found is None:
            return False
        del left[found]
    return True


def _part(text: str) -> str:
    try:
        return plain(text)
    except GuardedError:
        return ""


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += 1 if character in "([{" else -1 if character in ")]}" else 0
        if depth < 0:
            return False
    # Half-open intervals inside, such as (1, 2], do not match bracket for bracket.
    return depth == 0
