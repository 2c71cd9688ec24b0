"""From the text in an answer's tags to the text that is compared: what only dresses a value is taken off.

Every pattern here is linear in the length, which is bounded before anything else.
"""

from __future__ import annotations

import re
import unicodedata

from prism_megatron.rewards.verdict import GuardedError

MAX_CHARACTERS = 1024
"""Answers of as many characters are wrong, as in PRISM's released code."""

_SAME = {
    **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # full-width forms of ASCII
    **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\n\r", " "),
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63", "-"),
    **dict.fromkeys("\u2018\u2019\u02bc", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    "\u3002": ".", "\u3001": ",", "\u2044": "/", "\u2236": ":",
    "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": r"\div ",
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u2264": r"\le ", "\u2265": r"\ge ",
    "\u2260": r"\ne ", "\u2208": r"\in ", "\u222a": r"\cup ", "\u00b1": r"\pm ", "\u2205": r"\emptyset ",
    "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u03b8": r"\theta ",
    **{character: f"^{{{digit}}}" for digit, character in enumerate("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076")},
}  # fmt: skip
"""One spelling for what is written in several."""
_TABLE = str.maketrans(_SAME)
_ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|([0-9]+|[a-z]))")
_SPACING = re.compile(r"\\[,;:! ]|~|\\q?quad(?![a-zA-Z])")
_SAME_COMMANDS = (
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\leqs?l?a?n?t?(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\geqs?l?a?n?t?(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\(?:lt)(?![a-zA-Z])"), "<"),
    (re.compile(r"\\(?:gt)(?![a-zA-Z])"), ">"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\[lr]brace(?![a-zA-Z])"), lambda found: r"\{" if found.group()[1] == "l" else r"\}"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"(?<=[0-9])\{,\}(?=[0-9])"), ","),
)
_LEAD = re.compile(
    r"(?:(?:therefore|thus|hence|so)\b,? *)?(?:the )?(?:(?:final|correct|right) )?(?:answer|result)\s*(?:is|:|=) *:? *",
    re.IGNORECASE,
)
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"))
_WRAPPERS = tuple(rf"\{name}{{" for name in ("boxed", "fbox", "text", "textbf", "mathrm", "mathbf", "mathit"))
_MAX_LAYERS = 8
_BARE = re.compile(r"[A-Za-z0-9./+-]*[A-Za-z0-9]")
"""What nothing can be taken off."""


def plain(text: str) -> str:
    """One spelling of spaces, signs and commands, without what dresses the whole: ``$**\\boxed{5}**$`` is ``5``.

    Raises GuardedError for text that is empty, too long, or that holds control characters.
    """
    if len(text) >= MAX_CHARACTERS:
        raise GuardedError(f"{MAX_CHARACTERS} characters or more")
    if _BARE.fullmatch(text):
        return text
    text = unicodedata.normalize("NFC", text).translate(_TABLE)
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") for character in text):
        raise GuardedError("control characters")
    for _ in range(_MAX_LAYERS):
        text, before = _undress(text), text
        if text == before:
            break
    if not text:
        raise GuardedError("nothing in it")
    text = _SPACING.sub(" ", text)
    for pattern, same in _SAME_COMMANDS:
        text = pattern.sub(same, text)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found.group(1) or found.group(2)}}}", text)
    return re.sub(r" {2,}", " ", text).strip()


def _undress(text: str) -> str:
    """One layer less."""
    text = text.strip(" ")
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip(" ")
    for opening, closing in _PAIRS:
        inner = text[len(opening) : -len(closing)]
        if (
            len(text) > len(opening) + len(closing)
            and text.startswith(opening)
            and text.endswith(closing)
            and opening not in inner
            and closing not in inner
        ):
            return inner
    for wrapper in _WRAPPERS:
        if text.startswith(wrapper) and closing_of(text, len(wrapper) - 1) == len(text) - 1:
            return text[len(wrapper) : -1]
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead else text


def closing_of(text: str, start: int) -> int:
    """Where the brace that opens at ``start`` is closed, or -1."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return -1


def split_outside(text: str, separators: re.Pattern[str]) -> list[str]:
    """The parts of ``text`` between those matches that stand in no bracket of any form."""
    parts: list[str] = []
    start = position = depth = 0
    while position < len(text):
        depth += 1 if text[position] in "([{" else -1 if text[position] in ")]}" else 0
        found = separators.match(text, position) if depth <= 0 else None
        if found and found.end() > position:
            parts.append(text[start : found.start()].strip())
            start = position = found.end()
        else:
            position += 1
    return [*parts, text[start:].strip()]


_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9,]) | (?![A-Za-z0-9 ])")


def same_text(answer: str, gold: str) -> bool:
    """Whether two plain texts differ in such spaces alone as part no two words or numbers."""
    return answer == gold or _LOOSE_SPACE.sub("", answer) == _LOOSE_SPACE.sub("", gold)
