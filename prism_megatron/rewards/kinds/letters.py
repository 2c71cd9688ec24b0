"""Choices: one letter from A to H, several of them, or a letter with the text of its choice."""

from __future__ import annotations

import re
from typing import NamedTuple

from prism_megatron.rewards.answers import plain, same_text
from prism_megatron.rewards.verdict import GuardedError

_DRESSED = r"(?:[(\[{]\s*([A-Ha-h])\s*[)\]}]|([A-Ha-h])\s*[).:]?)"
_NAMED = re.compile(rf"(?:(?:the )?(?:option|choice|letter) )?{_DRESSED}", re.IGNORECASE)
_WITH_TEXT = re.compile(r"(?:[(\[]\s*([A-H])\s*[)\]]|([A-H])\s*[).:])[.:]?\s*(\S.*)", re.DOTALL)
_SEVERAL = re.compile(r"([A-H](?:\s*(?:,\s*and|,|;|and|&|/|\s)\s*[A-H])+)")
_RUN = re.compile(r"[A-H]{2,8}")
# A second letter, or a word that leaves the first one open, in what looks like the text of one choice.
_HEDGES = re.compile(
    r"(?<![A-Za-z0-9])(?:[A-H]|[b-h]|or|either|and/or|maybe|perhaps|not|both|all|options?|choices?|answer)"
    r"(?![A-Za-z0-9])"
)


class Choice(NamedTuple):
    """Chosen letters, capital and in order of the alphabet, and the text of the one choice where it is given."""

    letters: str
    text: str = ""


def gold_choice(gold: str, *, declared: bool) -> Choice | None:
    """The gold as a choice; ``declared`` where its record says that it is one: ``AC`` and small letters are, too."""
    if re.fullmatch(r"[A-H]|\([A-H]\)", gold):
        return Choice(gold.strip("()"))
    if declared and (found := _NAMED.fullmatch(gold)):
        return Choice((found.group(1) or found.group(2)).upper())
    if found := _SEVERAL.fullmatch(gold):
        return Choice("".join(sorted(re.findall(r"[A-H]", found.group(1)))))
    if declared and _RUN.fullmatch(gold) and len(set(gold)) == len(gold):
        return Choice("".join(sorted(gold)))
    if found := _WITH_TEXT.fullmatch(gold):
        return Choice(found.group(1) or found.group(2), found.group(3))
    return None


def chooses(answer: str, gold: Choice) -> bool:
    """Whether the answer names the gold's letters, each once, and nothing that contradicts them.

    A letter may be small, in brackets, or followed by the text of its choice. Where the gold has that text it must be
    the same, and may stand alone.
    """
    if len(gold.letters) > 1:
        return _several(answer) == gold.letters
    if found := _NAMED.fullmatch(answer):
        return (found.group(1) or found.group(2)).upper() == gold.letters
    if found := _WITH_TEXT.fullmatch(answer):
        letter, text = found.group(1) or found.group(2), found.group(3)
        if letter != gold.letters:
            return False
        return _same(text, gold.text) if gold.text else not _HEDGES.search(text)
    return bool(gold.text) and _same(answer, gold.text)


def _several(answer: str) -> str | None:
    bare = re.sub(r"[()\[\]{}.]", " ", answer).strip()
    if not (_SEVERAL.fullmatch(bare) or _RUN.fullmatch(bare)):
        return None
    return "".join(sorted(re.findall(r"[A-H]", bare)))


def _same(answer: str, gold: str) -> bool:
    try:
        return same_text(plain(answer).casefold(), plain(gold).casefold())
    except GuardedError:
        return False
