"""Answers in words: true and false, words that stand for a result, and any other text."""

from __future__ import annotations

import re

_TRUTH = {"true": True, "yes": True, "false": False, "no": False}
_RESULTS = (
    {"no solution", "no solutions", "there is no solution", "there are no solutions"},
    {"no real solution", "no real solutions"},
    {"does not exist", "dne"},
    {"undefined", "not defined"},
    {r"\infty", r"+\infty", "infinity", "+infinity", "positive infinity", "inf", "+inf"},
    {r"-\infty", "-infinity", "negative infinity", "minus infinity", "-inf"},
    {r"\emptyset", r"\varnothing", "empty set", "the empty set", r"\{\}", "{}"},
    {"all real numbers", r"\mathbb{r}", "all reals", "all real"},
    {"infinitely many solutions", "infinitely many", "infinite solutions"},
)
_CANONICAL = {word: min(group) for group in _RESULTS for word in group}
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname)\{([^{}]*)\}")
_SPACES = re.compile(r"\s+")


def truth_of(text: str) -> bool | None:
    """What ``true``, ``yes``, ``false`` or ``no`` says, in any case of letters; None for anything else."""
    return _TRUTH.get(text.casefold())


def words_of(text: str) -> str:
    """Text as it is compared: without the case of letters, an article before it and a stop behind it."""
    bare = _SPACES.sub(" ", _WRAPPED.sub(r"\1", text)).strip().casefold().rstrip(".!,;: ")
    bare = re.sub(r"^(?:the|an|a) (?=.)", "", bare)
    return _CANONICAL.get(bare, bare)


def is_result(text: str) -> bool:
    """Whether the text is one of the words that stand for a result, such as ``no solution``."""
    return words_of(text) in _CANONICAL.values()
