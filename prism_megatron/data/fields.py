"""Checks of JSON lines that come from outside: every complaint is a DataError naming file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from prism_megatron.errors import DataError


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every line that is not blank, with ``file:number`` to name it by."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def object_of(line: bytes, keys: Sequence[str], where: str) -> dict[str, Any]:
    """The line as an object with exactly these keys. Raises DataError."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise DataError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: not a JSON object")
    for key in keys:
        if key not in fields:
            raise DataError(f"{where}: field {key}: missing")
    for key in fields:
        if key not in keys:
            raise DataError(f"{where}: field {key}: unknown; the fields are {', '.join(keys)}")
    return fields


def check_text(value: Any, key: str, where: str) -> None:
    """Raise DataError for anything but text that is not blank and that a tokenizer accepts."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field {key}: text that is not empty expected")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise DataError(f"{where}: field {key}: holds half of a surrogate pair, which no tokenizer accepts")


def image_path(text: str, folder: Path, where: str) -> Path:
    """The file an image field names, with every link followed; it must lie inside ``folder``, itself without links.

    Raises DataError.
    """
    named = PurePosixPath(text)
    if named.is_absolute() or ".." in named.parts or "\0" in text:
        raise DataError(f"{where}: field image: {text!r} must be a path below the set's folder, without '..'")
    try:
        path = (folder / named).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise DataError(f"{where}: field image: {text!r} cannot be found: {error}") from error
    if not path.is_relative_to(folder) or not path.is_file():
        raise DataError(f"{where}: field image: {text!r} is not a file inside {folder}")
    return path
