"""Units behind numbers: one name for each, and products, quotients and powers of them. Nothing is converted."""

from __future__ import annotations

import re

Unit = tuple[tuple[str, int], ...]
"""Names with their exponents, in order: ``m/s^2`` is ``(("m", 1), ("s", -2))``."""

_ALIASES = {
    "mm": "millimeter millimetre millimeters millimetres", "cm": "centimeter centimetre centimeters centimetres",
    "dm": "decimeter decimetre decimeters decimetres", "m": "meter metre meters metres",
    "km": "kilometer kilometre kilometers kilometres", "in": "inch inches", "ft": "foot feet", "yd": "yard yards",
    "mi": "mile miles", "mg": "milligram milligrams", "g": "gram grams", "kg": "kilogram kilograms",
    "ton": "tons tonne tonnes", "lb": "pound pounds lbs", "oz": "ounce ounces", "ms": "millisecond milliseconds",
    "s": "sec secs second seconds", "min": "minute minutes mins", "h": "hr hrs hour hours", "day": "days",
    "week": "weeks", "month": "months", "year": "years yr yrs", "ml": "mL milliliter millilitre milliliters",
    "liter": "l L litre liters litres", "gal": "gallon gallons", "newton": "N newtons", "joule": "J joules",
    "kilojoule": "kJ kilojoules", "watt": "W watts", "kilowatt": "kW kilowatts", "volt": "V volts",
    "ampere": "A amperes amp amps", "ohm": "ohms Ω \\Omega", "hertz": "Hz", "khz": "kHz", "mhz": "MHz",
    "pascal": "Pa pascals", "kpa": "kPa", "mol": "mole moles", "kelvin": "K", "cal": "calorie calories",
    "kcal": "kilocalorie kilocalories", "mph": "", "kph": "", "deg": "degree degrees ^\\circ", "degc": "^\\circC °C",
    "degf": "^\\circF", "rad": "radian radians", "unit": "units", "usd": "$ \\$ dollar dollars USD",
    "cent": "cents ¢", "eur": "€ euro euros EUR", "gbp": "£ GBP", "jpy": "¥ yen JPY", "inr": "₹ rupee rupees Rs",
    "cup": "cups", "hectare": "hectares ha", "acre": "acres",
}  # fmt: skip
_NAME = {alias: name for name, others in _ALIASES.items() for alias in (name, *others.split())}
_TWO_WORDS = (("degrees celsius", "degc"), ("degrees fahrenheit", "degf"), ("pounds sterling", "gbp"))
_PART = re.compile(
    r"\s*(?P<link>/|\\cdot|\*|per\b)?\s*(?P<power>square|sq\.?|cubic|cu\.?)?\s*"
    r"(?P<name>\^\\circ\s?[CF]?|\\Omega|\\?\$|[A-Za-zΩ]+|[€£¥₹¢])\.?\s*(?:\^\s*\{?\s*(?P<exponent>-?[1-4])\s*\}?)?\s*"
)
_WRAPPED = re.compile(r"\\(?:text|mathrm|textrm|rm|mbox|operatorname)\s*\{([^{}]*)\}")
_TIMES_ITSELF = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_MAX_PARTS = 4
# Words behind a gold's number that change its value or make it an expression.
_NO_UNIT = frozenset(
    [
        "and",
        "or",
        "to",
        "of",
        "out",
        "over",
        "more",
        "less",
        "than",
        "times",
        "plus",
        "minus",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "dozen",
        "pi",
        "sqrt",
        "root",
        "log",
        "sin",
        "cos",
        "tan",
        "exp",
        "squared",
        "cubed",
        "factorial",
        "remainder",
        "between",
        "about",
        "least",
        "most",
        "point",
        "tenths",
        "hundredths",
    ]
)


def unit_of(text: str) -> Unit | None:
    """The unit that ``text`` is, empty for no text; None for anything but known units."""
    text = _WRAPPED.sub(r" \1", text).strip().rstrip(".")
    for words, known in _TWO_WORDS:
        if text.casefold() == words:
            return ((known, 1),)
    powers: dict[str, int] = {}
    position = parts = 0
    while position < len(text):
        found = _PART.match(text, position)
        name = (_NAME.get(found["name"].replace(" ", "")) or _long_name(found["name"])) if found else None
        if not found or not name or parts == _MAX_PARTS:
            return None
        power = int(found["exponent"] or 1) * _TIMES_ITSELF.get((found["power"] or "").rstrip("."), 1)
        powers[name] = powers.get(name, 0) + (-power if found["link"] in ("/", "per") else power)
        position, parts = found.end(), parts + 1
    return tuple(sorted(item for item in powers.items() if item[1]))


def without_unit(text: str) -> tuple[str, Unit]:
    """An expression and the unit behind it, such as ``2\\pi \\text{ cm}``; no unit where that may be a variable."""
    start = max(text.rfind(f"\\{name}") for name in ("text", "mathrm", "textrm"))
    if start <= 0:
        start = text.rfind(" ")
        if not re.fullmatch(r" [a-z]{2,}\.?(?:\^\{?[23]\}?)?", text[start:]):
            return text, ()
    unit = unit_of(text[start:])
    return (text[:start].rstrip(), unit) if unit and start > 0 else (text, ())


def _long_name(text: str) -> str | None:
    """Of names that are written out, in any case of letters; ``M`` and ``m`` are not the same."""
    return _NAME.get(text.casefold()) if len(text) > 2 else None


def noun_of(text: str) -> Unit | None:
    """What a gold counts, such as ``red apples``: one or two plain words as a unit of their own; None for others."""
    words = _WRAPPED.sub(r" \1", text).casefold().rstrip(". ").split()
    if not 1 <= len(words) <= 2 or not all(re.fullmatch(r"[a-z]{3,}", word) for word in words):
        return None
    return None if _NO_UNIT.intersection(words) else ((" ".join(words), 1),)
