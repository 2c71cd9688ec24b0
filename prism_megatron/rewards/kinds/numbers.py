"""Numbers with what stands around them: signs, thousands, fractions, powers of ten, percent, units, currencies.

All arithmetic is exact, and every part of a number is bounded before it becomes one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_megatron.rewards.kinds.units import Unit, noun_of, unit_of

TOLERANCE = Fraction(1, 10**6)
"""Relative, where the answer or the gold is a decimal (the method's rule); fractions and whole numbers are exact."""
_MAX_EXPONENT = 400

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_PLAIN = re.compile(_DECIMAL)
_TEN = re.compile(
    r"(?:[eE]([+-]?[0-9]{1,4})(?![0-9A-Za-z.]))|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*([+-]?\s*[0-9]{1,4})\s*\}|([+-]?[0-9]{1,4}))"
)
_POWER_OF_TEN = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?[0-9]{1,4})\s*\}|([+-]?[0-9]{1,4}))(?![0-9])")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{([0-9]{1,20})\}")
_SLASHED = re.compile(rf"({_DECIMAL})\s*/\s*({_DECIMAL})(?![0-9.])")
_STACKED = re.compile(r"\\frac\s*(?:\{\s*(-?)\s*([0-9.,]+)\s*\}\s*\{\s*(-?)\s*([0-9.,]+)\s*\}|()([0-9])()\s*([0-9]))")
_MIXED = re.compile(
    r"([0-9]+)(?:\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9.])|\s*\\frac\s*(?:\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])([0-9])))"
)
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5),
    "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8), "⅑": (1, 9),
    "⅒": (1, 10),
}  # fmt: skip
_WITH_VULGAR = re.compile(rf"([0-9]*)\s*([{''.join(_VULGAR)}])")
_SIGN = re.compile(r"\s*([+-]?)\s*((?:\\?\$|[€£¥₹]|USD|EUR|GBP|Rs\.?)?)\s*([+-]?)\s*")
_PERCENT = re.compile(r"\s*(?:\\?%|percent(?:age)?|per cent)\s*", re.IGNORECASE)
_MAGNITUDE = re.compile(r"\s*(hundred|thousand|million|billion|trillion|dozen)\b(?:\s+of\b)?", re.IGNORECASE)
_FACTOR = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# A letter right behind a number may as well be a variable.
_GLUED_LETTER = re.compile(r"[A-Za-z](?![A-Za-z])")
_VARIABLE = re.compile(r"(?:([A-Z]{1,3}|[A-Za-z](?:_\{?[A-Za-z0-9]\}?)?|\\[a-z]+)\s*=\s*)([^=]+)")


@dataclass(frozen=True)
class Quantity:
    """A number as it was written.

    Example: ``$1.50`` is ``Quantity(Fraction(3, 2), decimal=True, unit=(("usd", 1),))``.
    """

    value: Fraction
    decimal: bool = False
    """a decimal point or a power of ten stands in it, so that it may be rounded"""
    percent: bool = False
    unit: Unit = ()
    unit_may_lack: bool = True
    """False where the unit is a letter right behind the number, which may be a variable"""


def quantity_of(text: str, *, trusted: bool = False) -> Quantity | None:
    """The number that all of ``text`` is; None for anything else. A ``trusted`` text may count anything.

    Example: ``-1 1/2 cm`` is -3/2 with a unit.
    """
    if text.startswith("(") and text.endswith(")") and "," not in text and "(" not in text[1:]:
        text = text[1:-1]
    lead = _SIGN.match(text)
    assert lead is not None
    if lead[1] and lead[3]:
        return None
    number = _numeral(text, lead.end())
    if number is None:
        return None
    value, end, decimal = number
    if found := _MAGNITUDE.match(text, end):
        value, end = value * _FACTOR[found[1].casefold()], found.end()
    value = -value if "-" in (lead[1], lead[3]) else value
    rest = text[end:]
    if _PERCENT.fullmatch(rest):
        return None if lead[2] else Quantity(value, decimal, percent=True)
    unit = unit_of(rest)
    if unit is None and trusted:
        unit = noun_of(rest)
    currency = unit_of(lead[2].rstrip("."))
    if unit is None or currency is None or (unit and currency and unit != currency):
        return None
    return Quantity(value, decimal, unit=unit or currency, unit_may_lack=not _GLUED_LETTER.match(rest))


def same_quantity(answer: Quantity, gold: Quantity) -> bool:
    """Whether the answer is the gold's number.

    A unit that only one of them has is let pass, two units must be the same. ``28`` is right for ``28%``, and ``28%``
    for ``28`` where that is more than 1 and so no share; else percent are hundredths.
    """
    if answer.unit != gold.unit:
        if answer.unit and gold.unit:
            return False
        if not (answer.unit_may_lack and gold.unit_may_lack):
            return False
    if answer.percent != gold.percent:
        if (gold.percent or abs(gold.value) > 1) and not answer.unit and _close(answer, gold, answer.value, gold.value):
            return True
        if answer.unit or gold.unit:
            return False
    return _close(answer, gold, _share(answer), _share(gold))


def _share(quantity: Quantity) -> Fraction:
    return quantity.value / 100 if quantity.percent else quantity.value


def _close(answer: Quantity, gold: Quantity, value: Fraction, wanted: Fraction) -> bool:
    if not (answer.decimal or gold.decimal):
        return value == wanted
    return abs(value - wanted) <= TOLERANCE * abs(wanted)


def without_variable(text: str) -> tuple[str, str]:
    """``x = 5`` as ``x`` and ``5``; no name where no single variable is set."""
    found = _VARIABLE.fullmatch(text)
    return (found[1], found[2].strip()) if found else ("", text)


def _numeral(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    """Value, end, and whether it is a decimal, of the unsigned number that begins at ``start``."""
    for read in (_mixed, _vulgar, _stacked, _slashed, _repeating, _ten_to, _scientific):
        found = read(text, start)
        if found is not None:
            return found
    return None


def _mixed(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    if not (found := _MIXED.match(text, start)):
        return None
    top, bottom = (int(found[a] or found[b] or found[c]) for a, b, c in ((2, 4, 6), (3, 5, 7)))
    return (int(found[1]) + Fraction(top, bottom), found.end(), False) if bottom > top else None


def _vulgar(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    if not (found := _WITH_VULGAR.match(text, start)):
        return None
    return int(found[1] or 0) + Fraction(*_VULGAR[found[2]]), found.end(), False


def _stacked(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    if not (found := _STACKED.match(text, start)):
        return None
    signs = (found[1] or "") + (found[3] or "")
    top, bottom = found[2] or found[6], found[4] or found[8]
    if not (_PLAIN.fullmatch(top) and _PLAIN.fullmatch(bottom)) or not (below := _fraction(bottom)):
        return None
    return (-1) ** len(signs) * _fraction(top) / below, found.end(), False


def _slashed(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    if not (found := _SLASHED.match(text, start)) or not (below := _fraction(found[2])):
        return None
    return _fraction(found[1]) / below, found.end(), False


def _repeating(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    if not (found := _REPEATING.match(text, start)):
        return None
    places, again = len(found[2]), found[3]
    head = Fraction(int((found[1] or "0") + found[2]), 10**places)
    return head + Fraction(int(again), 10**places * (10 ** len(again) - 1)), found.end(), False


def _ten_to(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    if not (found := _POWER_OF_TEN.match(text, start)):
        return None
    power = int(found[1] or found[2])
    return (Fraction(10) ** power, found.end(), False) if abs(power) <= _MAX_EXPONENT else None


def _scientific(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    if not (found := _PLAIN.match(text, start)):
        return None
    value, end, decimal = _fraction(found[0]), found.end(), "." in found[0]
    if ten := _TEN.match(text, end):
        power = int((ten[1] or ten[2] or ten[3]).replace(" ", ""))
        if abs(power) > _MAX_EXPONENT:
            return None
        value, end, decimal = value * Fraction(10) ** power, ten.end(), True
    return value, end, decimal


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").removesuffix("."))
