"""Files that hold one JSON object: the one way to read those that others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prism_megatron.errors import PrismError
from prism_megatron.strict_json import parse_json


def read_object(path: Path, *, error: type[PrismError]) -> dict[str, Any]:
    """The object in ``path``. Raises ``error`` for anything else, and as ``strict_json.parse_json`` does."""
    try:
        data = path.read_bytes()
    except OSError as caught:
        raise error(f"{path} cannot be read as JSON: {caught}") from caught
    return parse_object(data, path, error=error)


def parse_object(text: str | bytes, path: Path, *, error: type[PrismError]) -> dict[str, Any]:
    """``text`` as one JSON object; ``path`` names it in errors, which are those of ``read_object``."""
    try:
        parsed = parse_json(text)
    except ValueError as caught:
        raise error(f"{path} cannot be read as JSON: {caught}") from caught
    if not isinstance(parsed, dict):
        raise error(f"{path} holds {type(parsed).__name__}, expected a JSON object")
    return parsed
