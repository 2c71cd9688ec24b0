"""Ratios such as ``3:2`` and times such as ``5:45`` or ``7:30 pm``, which look alike and are equal by other rules."""

from __future__ import annotations

import re
from fractions import Fraction
from math import gcd

_RATIO = re.compile(r"([0-9]{1,9}(?:\s*:\s*[0-9]{1,9}){1,4})")
_TO = re.compile(r"([0-9]{1,9})\s+to\s+([0-9]{1,9})")
_FRACTION = re.compile(r"([0-9]{1,9})\s*/\s*([0-9]{1,9})|\\frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}")
_TIME = re.compile(r"([0-9]{1,2})\s*:\s*([0-5][0-9])(?::([0-5][0-9]))?\s*([ap])?\.?(m)?\.?", re.IGNORECASE)


def ratio_of(text: str) -> tuple[int, ...] | None:
    """The parts of a ratio; None for anything else."""
    if found := _RATIO.fullmatch(text):
        return tuple(int(part) for part in found[1].split(":"))
    found = _TO.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else None


def is_time(text: str) -> bool:
    """Whether the text can be a time of day, or minutes and seconds."""
    found = _TIME.fullmatch(text)
    return found is not None and bool(found[4]) == bool(found[5]) and int(found[1]) <= 24


def same_ratio(answer: str, gold: str) -> bool:
    """Whether the parts stand in the gold's proportion; for two parts a fraction says it too."""
    wanted, parts = ratio_of(gold), ratio_of(answer)
    assert wanted is not None
    if parts is None and len(wanted) == 2 and (found := _FRACTION.fullmatch(answer)):
        top, bottom = (int(found[a] or found[b]) for a, b in ((1, 3), (2, 4)))
        return 0 not in (bottom, wanted[1]) and Fraction(top, bottom) == Fraction(*wanted)
    return parts is not None and _reduced(parts) == _reduced(wanted)


def same_time(answer: str, gold: str) -> bool:
    """Whether it is the gold's time to the second.

    Half of the day that only the answer names is let pass; one that the gold names has to be in the answer, also as a
    time of 24 hours.
    """
    if not is_time(answer):
        return False
    (clock, half), (wanted, wanted_half) = _clock(answer), _clock(gold)
    if wanted_half and not half:
        return clock == wanted and clock[0] > 12
    if half and not wanted_half:
        return clock == wanted or (wanted[0] <= 12 and (clock[0] % 12, *clock[1:]) == (wanted[0] % 12, *wanted[1:]))
    return clock == wanted


def _clock(text: str) -> tuple[tuple[int, ...], str]:
    found = _TIME.fullmatch(text)
    assert found is not None
    hour, half = int(found[1]), (found[4] or "").lower()
    if half:
        hour = hour % 12 + (12 if half == "p" else 0) if hour <= 12 else hour
    return (hour, int(found[2]), int(found[3] or 0)), half


def _reduced(parts: tuple[int, ...]) -> tuple[int, ...]:
    divisor = gcd(*parts) or 1
    return tuple(part // divisor for part in parts)
