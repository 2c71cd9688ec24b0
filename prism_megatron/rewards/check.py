"""Is an answer the gold's? The gold is trusted and decides by which rules; the answer is hostile.

Everything but algebra is safe by construction and takes microseconds: exact arithmetic on bounded numbers, patterns
that are linear in a bounded text. Algebra (``kinds/latex.py``) is handed in, by workers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial

from prism_megatron.rewards.answers import plain, same_text
from prism_megatron.rewards.guards import check_expression, is_expression
from prism_megatron.rewards.kinds.brackets import (
    bracket_of,
    same_in_any_order,
    same_in_order,
    values_of,
)
from prism_megatron.rewards.kinds.letters import chooses, gold_choice
from prism_megatron.rewards.kinds.numbers import Quantity, quantity_of, same_quantity, without_variable
from prism_megatron.rewards.kinds.ratios import is_time, ratio_of, same_ratio, same_time
from prism_megatron.rewards.kinds.units import without_unit
from prism_megatron.rewards.kinds.words import is_result, truth_of, words_of
from prism_megatron.rewards.verdict import GUARDED, Ask, GuardedError, NeedsAlgebraError, Verdict

Algebra = Callable[[str, str], bool]
"""Whether two plain expressions, both past the guards, are equal."""

_MAX_DEPTH = 3
MOST_WORDS = 10
"""A text of more words is right in other words too, which no rule sees."""


def no_algebra(answer: str, gold: str) -> bool:
    """Of a process that must not run it. Raises NeedsAlgebraError always."""
    del answer, gold
    raise NeedsAlgebraError


def settle(ask: Ask) -> Verdict | None:
    """The verdict if it needs no worker, else None."""
    try:
        return judge(ask, no_algebra)
    except NeedsAlgebraError:
        return None


def judge(ask: Ask, algebra: Algebra) -> Verdict:
    """The verdict of one check. Raises what ``algebra`` raises.

    Example: ``judge(Ask("$\\\\frac12$", "0.5"), no_algebra).right``.
    """
    began = time.perf_counter()
    try:
        gold, kind = _read_gold(ask.gold, ask.answer_type)
    except GuardedError as error:
        # No gold of a checked set is like this.
        return Verdict(False, "text", time.perf_counter() - began, f"{GUARDED}the gold has {error}")
    try:
        right = _same(plain(ask.answer), gold, kind=kind, declared=ask.answer_type == "choice", algebra=algebra)
    except GuardedError as error:
        return Verdict(False, kind, time.perf_counter() - began, f"{GUARDED}{error}")
    return Verdict(right, kind, time.perf_counter() - began)


def is_checkable(gold: str, answer_type: str | None = None) -> bool:
    """Whether a right answer would be found right: not one to a gold of a sentence or more, or that guards refuse.

    Example: ``is_checkable("13 cm")``; a gold that takes algebra is right by its own text, which needs none.
    """
    verdict = settle(Ask(gold, gold, answer_type))
    return verdict is not None and verdict.right and (verdict.kind != "text" or len(gold.split()) <= MOST_WORDS)


def kind_of(gold: str, answer_type: str | None = None) -> str:
    """By which rules a plain gold is compared."""
    if answer_type != "text" and gold_choice(gold, declared=answer_type == "choice"):
        return "letters"
    if truth_of(gold) is not None:
        return "truth"
    value = without_variable(gold)[1]
    if quantity_of(value, trusted=True) is not None:
        return "number"
    if is_result(gold):
        return "text"
    if (bracket := bracket_of(value)) is not None:
        return bracket.kind
    if is_time(value):
        return "time"
    if ratio_of(value) is not None:
        return "ratio"
    if len(values := values_of(gold)) > 1 and all(_is_value(part) for part in values):
        return "list"
    return "latex" if is_expression(gold) else "text"


@lru_cache(maxsize=4096)
def _read_gold(text: str, answer_type: str | None) -> tuple[str, str]:
    gold = plain(text)
    return gold, kind_of(gold, answer_type)


@lru_cache(maxsize=4096)
def _gold_quantity(text: str) -> Quantity:
    right = quantity_of(text, trusted=True)
    assert right is not None
    return right


def _is_value(text: str) -> bool:
    return bool(text) and (len(text) == 1 or kind_of(text) != "text" or is_result(text))


def _same(answer: str, gold: str, *, kind: str, declared: bool, algebra: Algebra, depth: int = 0) -> bool:
    if kind == "letters":
        choice = gold_choice(gold, declared=declared)
        assert choice is not None
        return chooses(answer, choice)
    if kind == "truth":
        return truth_of(answer) == truth_of(gold)
    if same_text(answer, gold) or (words_of(answer) == words_of(gold) and kind == "text"):
        return True
    if kind == "text" or depth > _MAX_DEPTH:
        return False
    return _RULES[kind](answer, gold, algebra, depth)


def _same_number(answer: str, gold: str, algebra: Algebra, depth: int) -> bool:
    """A number has to be written out: arithmetic that the reader would have to do is no answer."""
    del algebra, depth
    (name, value), (wanted_name, wanted) = without_variable(answer), without_variable(gold)
    if name and wanted_name and name != wanted_name:
        return False
    right = _gold_quantity(wanted)
    found = quantity_of(value) or (quantity_of(value, trusted=True) if right.unit else None)
    return found is not None and same_quantity(found, right)


def _same_bracket(answer: str, gold: str, algebra: Algebra, depth: int) -> bool:
    (name, value), (wanted_name, wanted) = without_variable(answer), without_variable(gold)
    if name and wanted_name and name != wanted_name:
        return False
    found, right = bracket_of(value), bracket_of(wanted)
    assert right is not None
    same = partial(_same_part, algebra=algebra, depth=depth + 1)
    if right.kind == "set":
        parts = values_of(value) if found is None and "=" not in value else () if found is None else found.parts
        is_set = found is None or found.kind == "set"
        return is_set and same_in_any_order(parts, right.parts, same)
    if found is not None:
        ends = (found.opens, found.closes) == (right.opens, right.closes)
        return ends and same_in_order(found.parts, right.parts, same)
    # An interval may be said by what fulfils it.
    return (
        len(right.parts) == 2
        and any(sign in answer for sign in ("<", ">", r"\le", r"\ge"))
        and _asked(answer, gold, algebra)
    )


def _same_list(answer: str, gold: str, algebra: Algebra, depth: int) -> bool:
    same = partial(_same_part, algebra=algebra, depth=depth + 1)
    return same_in_order(values_of(answer), values_of(gold), same)


def _same_part(answer: str, gold: str, *, algebra: Algebra, depth: int) -> bool:
    if not answer or not gold:
        return False
    return _same(answer, gold, kind=kind_of(gold, "text"), declared=False, algebra=algebra, depth=depth)


def _same_ratio(answer: str, gold: str, algebra: Algebra, depth: int) -> bool:
    del algebra, depth
    (name, value), (wanted_name, wanted) = without_variable(answer), without_variable(gold)
    return (not (name and wanted_name) or name == wanted_name) and same_ratio(value, wanted)


def _same_time(answer: str, gold: str, algebra: Algebra, depth: int) -> bool:
    del algebra, depth
    return same_time(answer, gold)


def _same_latex(answer: str, gold: str, algebra: Algebra, depth: int) -> bool:
    del depth
    (value, unit), (wanted, wanted_unit) = without_unit(answer), without_unit(gold)
    if unit and wanted_unit and unit != wanted_unit:
        return False
    return same_text(value, wanted) or _asked(value, wanted, algebra)


def _asked(answer: str, gold: str, algebra: Algebra) -> bool:
    if not is_expression(answer):
        return False
    check_expression(answer)
    try:
        check_expression(gold)
    except GuardedError:
        return False  # such a gold is equal to its own text alone
    return algebra(answer, gold)


_RULES: dict[str, Callable[[str, str, Algebra, int], bool]] = {
    "number": _same_number,
    "tuple": _same_bracket,
    "interval": _same_bracket,
    "set": _same_bracket,
    "list": _same_list,
    "ratio": _same_ratio,
    "time": _same_time,
    "latex": _same_latex,
}
