"""Questions and answers as they are compared: without case, without punctuation, in the words that they have.

A word is a run of letters and digits, one sign of a script that is written without spaces, or one sign of arithmetic:
``-3`` and ``3`` are different texts, ``Why?`` and ``why`` are not.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from prism_megatron.data.records import Record

Words = frozenset[str]
Shingles = frozenset[tuple[str, ...]]

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s.,;:!?'\"()\[\]{{}}]")
_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?")
_SHINGLE = 2
_UNTELLING = {"true", "false", "yes", "no"}


def plain_text(text: str) -> str:
    """The text without what its spelling adds: compatible signs are one sign, without case, one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(plain_text(text))


def shingles_of(words: list[str]) -> Shingles:
    """Neighbouring words, two at a time; of a shorter text all that it has."""
    if len(words) < _SHINGLE:
        return frozenset([tuple(words)])
    return frozenset(zip(*(words[i:] for i in range(_SHINGLE)), strict=False))


def overlap(one: frozenset[object], other: frozenset[object]) -> float:
    """The Jaccard index: of all that either has, the share that both have; 0 where neither has anything."""
    either = len(one | other)
    return len(one & other) / either if either else 0.0


def answer_of(record: Record) -> str:
    """What is answered, so that equal answers are equal texts: of choices the chosen text, of a number its value."""
    text = record.answer if record.choices is None else record.choices[ord(record.answer) - ord("A")]
    text = plain_text(text)
    return f"{Decimal(text).normalize():f}" if _NUMBER.fullmatch(text) else text


def is_telling(answer: str) -> bool:
    """Whether it says something that two problems hardly share by chance; yes and no do not."""
    return answer not in _UNTELLING
