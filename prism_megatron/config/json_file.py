"""Files that hold one JSON object: the one way to read those that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from prism_megatron.errors import PrismError


def read_object(path: Path, *, error: type[PrismError]) -> dict[str, Any]:
    """The object in ``path``. Raises ``error`` for anything else, repeated keys, and NaN or Infinity."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as caught:
        raise error(f"{path} cannot be read as JSON: {caught}") from caught
    return parse_object(text, path, error=error)


def parse_object(text: str, path: Path, *, error: type[PrismError]) -> dict[str, Any]:
    """``text`` as one JSON object; ``path`` names it in errors, which are those of ``read_object``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise error(f"{path} lists {key!r} twice")
            seen[key] = value
        return seen

    def refuse(constant: str) -> NoReturn:
        raise error(f"{path} holds {constant}, which is not JSON")

    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as caught:  # ValueError: a number of too many digits
        raise error(f"{path} cannot be read as JSON: {caught}") from caught
    if not isinstance(parsed, dict):
        raise error(f"{path} holds {type(parsed).__name__}, expected a JSON object")
    return parsed
