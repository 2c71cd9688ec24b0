"""Whether two expressions are equal, by math-verify's parser and sympy. Runs in a worker alone: nothing here is quick.

math-verify's own comparison is not asked: it takes different things for equal (``docs/rewards.md`` has its list: small
numbers that differ, what follows an ``=``, texts that it reads in part). Here the parser has to read all of a text, and
values are compared by evaluation to 30 digits, at points where there are variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from sympy.core.relational import Eq, Ne, Relational
from sympy.logic.boolalg import And

from prism_megatron.rewards.kinds.numbers import quantity_of, without_variable

_DIGITS = 30
_EXACT = sympy.Float("1e-20", 20)
_ROUNDED = sympy.Float("1e-6", 20)
_MAX_ELEMENTS = 64
# Points for variables: of both signs, no two related by a small formula.
_POINTS = tuple(
    sympy.Rational(numerator, 7919)
    for numerator in (9173, 13487, 4391, 21013, 6211, 17389, -5323, -11927, -2711, -15551, 31177, 25037)
)
_ROUNDS = 8
_FEWEST_REAL = 2

_SPELLINGS = (
    (re.compile(r"\\(?:mathrm|text|operatorname)\s*\{\s*([A-Za-z])\s*\}"), r" \1 "),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\{[^{}]*\})\s*([0-9A-Za-z])"), r"\\frac\1{\2}"),
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*(\{)"), r"\\frac{\1}\2"),
    (re.compile(r"\\sqrt\s*([0-9]|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s+(\\[a-z]+)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(le|ge|ne|in|cup|cap|cdot|times|div|pi|infty)(?![A-Za-z])\s*"), r"\\\1 "),
    (re.compile(r"(?<!\\)\b(sin|cos|tan|log|exp|sqrt)\s*\("), r"\\\1("),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"\+\s*\\infty"), r"\\infty"),
    (re.compile(r"\\(?:emptyset|varnothing)"), r"\\emptyset"),
)
_MEMBER = re.compile(r"\s*(?:[A-Za-z]|\\[a-z]+)\s*\\in\b\s*")


def same_expression(answer: str, gold: str) -> bool:
    """Whether two plain texts are equal as mathematics; what the parser cannot read is equal to nothing."""
    (name, value), (wanted_name, wanted) = without_variable(answer), without_variable(gold)
    if name == wanted_name or (bool(name) != bool(wanted_name) and "=" not in (wanted if name else value)):
        # y = 2x + 1 beside 2x + 1; beside 2x - y = -1 it stays an equation.
        answer, gold = value, wanted
    parsed, right = read(answer), read(gold)
    if parsed is None or right is None:
        return False
    try:
        return _same(parsed, right)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # sympy raises anything, and each of it says that it cannot tell
        return False


@lru_cache(maxsize=256)
def read(text: str) -> Any:
    """What a text says to sympy, or None."""
    if (quantity := quantity_of(text)) is not None and not quantity.unit:
        value = sympy.Rational(quantity.value.numerator, quantity.value.denominator)
        value = value / 100 if quantity.percent else value
        return sympy.Float(value, _DIGITS) if quantity.decimal else value
    text = _MEMBER.sub("", text, count=1) if _MEMBER.match(text) else text
    for pattern, same in _SPELLINGS:
        text = pattern.sub(same, text)
    if r"\sqrt(" in text.replace(" ", ""):
        return None
    try:
        parsed = latex2sympy(text, normalization_config=None)
        return parsed.doit() if hasattr(parsed, "doit") else parsed
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # parser and sympy raise anything, and each of it says that this is no expression
        return None


def _same(one: Any, gold: Any) -> bool:
    if isinstance(gold, sympy.MatrixBase) or isinstance(one, sympy.MatrixBase):
        return _same_matrix(one, gold)
    if isinstance(gold, Eq) or isinstance(one, Eq):
        return isinstance(one, Eq) and isinstance(gold, Eq) and _same_equation(one, gold)
    if _is_condition(gold) or _is_condition(one):
        return _same_condition(one, gold)
    if isinstance(gold, sympy.Set) or isinstance(one, sympy.Set):
        return isinstance(one, sympy.Set) and isinstance(gold, sympy.Set) and _same_set(one, gold)
    if isinstance(gold, sympy.Tuple | tuple) or isinstance(one, sympy.Tuple | tuple):
        return type(one) is type(gold) and len(one) == len(gold) and all(map(_same, one, gold))
    return isinstance(one, sympy.Expr) and isinstance(gold, sympy.Expr) and _same_value(one, gold)


def _same_value(one: sympy.Expr, gold: sympy.Expr) -> bool:
    """By values at points: where one is real the other has to be real and equal; complex ones decide where none is."""
    if one.free_symbols != gold.free_symbols:
        return False
    if {sympy.oo, -sympy.oo} & {one, gold}:
        return bool(one == gold)
    tolerance = _ROUNDED if one.has(sympy.Float) or gold.has(sympy.Float) else _EXACT
    complex_ones: list[bool] = []
    num_real = 0
    for point in _points(gold):
        values = [_value(each, point) for each in (one, gold)]
        if values == [None, None] and point:
            continue
        if None in values:
            return False
        real = [value.is_real for value in values]
        if real[0] != real[1]:
            return False
        equal = _near(values[0], values[1], tolerance)
        if not real[0]:
            complex_ones.append(equal)
        elif not equal:
            return False
        else:
            num_real += 1
    return num_real >= (_FEWEST_REAL if gold.free_symbols else 1) or (bool(complex_ones) and all(complex_ones))


def _points(expression: sympy.Expr) -> Iterator[dict[Any, Any]]:
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols:
        yield {}
        return
    for turn in range(_ROUNDS):
        yield {symbol: _POINTS[(turn + 5 * place) % len(_POINTS)] for place, symbol in enumerate(symbols)}


def _value(expression: sympy.Expr, point: dict[Any, Any]) -> Any:
    """The number at a point; None where there is none."""
    value = expression.subs(point).evalf(_DIGITS) if point else expression.evalf(_DIGITS)
    if not value.is_number or value.has(sympy.oo, sympy.zoo, sympy.nan, -sympy.oo):
        return None
    real, imaginary = value.as_real_imag()
    if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
        return None
    if imaginary and abs(imaginary) <= abs(real) * _EXACT:
        return real
    return value


def _near(one: Any, gold: Any, tolerance: Any) -> bool:
    if one == gold:
        return True
    return bool(abs(one - gold) <= tolerance * abs(gold))


def _same_equation(one: Eq, gold: Eq) -> bool:
    """Whether one is the other times a number that is not zero."""
    return _proportional(one.lhs - one.rhs, gold.lhs - gold.rhs) is not None


def _proportional(one: Any, gold: Any) -> Any:
    """The factor between two expressions, or None where it is not the same at every point."""
    if not (isinstance(one, sympy.Expr) and isinstance(gold, sympy.Expr)):
        return None
    if one.free_symbols != gold.free_symbols or not gold.free_symbols:
        return None
    factor = None
    for point in _points(gold):
        values = [_value(each, point) for each in (one, gold)]
        if None in values or not values[0] or not values[1]:
            return None
        ratio = values[0] / values[1]
        factor = ratio if factor is None else factor
        if not _near(ratio, factor, _EXACT):
            return None
    return factor


def _is_condition(value: Any) -> bool:
    return isinstance(value, Relational | And)


def _same_condition(one: Any, gold: Any) -> bool:
    """Of one variable by what fulfils it, which a set may say too; of several as it is written, times a number."""
    names = {symbol for value in (one, gold) if _is_condition(value) for symbol in value.free_symbols}
    if len(names) == 1:
        (name,) = names
        sets = [_solutions(value, name) for value in (one, gold)]
        return None not in sets and _same_set(*sets)
    if not (isinstance(one, Relational) and isinstance(gold, Relational)):
        return False
    one, gold = one.canonical if one.func == Ne else one, gold.canonical if gold.func == Ne else gold
    factor = _proportional(one.lhs - one.rhs, gold.lhs - gold.rhs)
    if factor is None or not factor.is_real:
        return False
    return bool(one.func == (gold.func if factor > 0 else gold.reversed.func))


def _solutions(value: Any, name: Any) -> Any:
    if isinstance(value, sympy.Set):
        return value
    if not _is_condition(value):
        return None
    real = sympy.Symbol("x", real=True)
    found = value.subs(name, real)
    if found in (sympy.true, sympy.false):
        return None
    try:
        return found.as_set()
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # sympy cannot solve it
        return None


def _same_set(one: sympy.Set, gold: sympy.Set) -> bool:
    if isinstance(gold, sympy.Interval) and isinstance(one, sympy.Interval):
        return (
            (one.left_open, one.right_open) == (gold.left_open, gold.right_open)
            and _same_value(one.start, gold.start)
            and _same_value(one.end, gold.end)
        )
    if isinstance(gold, sympy.FiniteSet) and isinstance(one, sympy.FiniteSet):
        return _matched(list(one.args), list(gold.args), _same)
    if isinstance(gold, sympy.Union) and isinstance(one, sympy.Union):
        return _matched(list(one.args), list(gold.args), _same_set)
    return bool(one == gold)


def _matched(ones: list[Any], golds: list[Any], same: Any) -> bool:
    if len(ones) != len(golds) or len(golds) > _MAX_ELEMENTS:
        return False
    for one in ones:
        found = next((place for place, gold in enumerate(golds) if same(one, gold)), None)
        if found is None:
            return False
        del golds[found]
    return True


def _same_matrix(one: Any, gold: Any) -> bool:
    if not (isinstance(one, sympy.MatrixBase) and isinstance(gold, sympy.MatrixBase)) or one.shape != gold.shape:
        return False
    return len(gold) <= _MAX_ELEMENTS and all(map(_same, one, gold))
