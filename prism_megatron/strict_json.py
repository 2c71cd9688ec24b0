"""JSON that two readers cannot take for two things: no key twice, no number beyond JSON, UTF-8 alone.

The one reader for what users write. It knows no file: callers put the name before the reason.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse_json(text: str | bytes) -> Any:
    """The value that ``text`` stands for.

    Raises ValueError, with a reason that reads on after a file's name, for what is no JSON, for bytes that are not
    UTF-8, for an object with a key that stands twice, for NaN and infinities (also such as 1e999), for whole numbers of
    thousands of digits, and for nesting that is too deep for Python.
    """
    if isinstance(text, bytes):
        text = utf8(text)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def utf8(data: bytes) -> str:
    """``data`` as text. Raises ValueError, as :func:`parse_json`, for what is not UTF-8, or begins with its mark."""
    if (other := other_encoding(data)) is not None:
        raise ValueError(f"it is encoded in {other}; save it as UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte 0x{data[error.start]:02x} at position {error.start + 1} is no UTF-8, as in latin-1 and other older "
            "encodings; save it as UTF-8"
        ) from None


def other_encoding(data: bytes) -> str | None:
    """The encoding that the first bytes of a JSON text give away, or None where it may be UTF-8."""
    found = json.detect_encoding(data[:4])
    if found == "utf-8":
        return None
    return "UTF-8 with a byte order mark, which JSON must not have" if found == "utf-8-sig" else found.upper()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} stands twice in one object; leave one of them out")
            seen.add(key)
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON; write a number, or null")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number
