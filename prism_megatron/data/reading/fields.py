"""Checks of JSON lines that come from outside: every complaint is a DataError naming file, line and field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from prism_megatron.data.reading.intake import ImageError, JsonError
from prism_megatron.errors import DataError
from prism_megatron.strict_json import other_encoding, parse_json

_NAMES: dict[type, str] = {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
_REMEDIES: dict[type, str] = {
    list: "give one text",
    dict: "give its text alone",
    bool: "put it in quotes",
    int: "put it in quotes",
    float: "put it in quotes",
    type(None): "fill it in, or leave the line out",
}
_IMAGE_REMEDIES: dict[type, str] = {
    list: "a record has one image, so give the path of one file",
    dict: "give the path of its file alone",
}


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Every line that is not blank, with ``file:number`` to name it by.

    Raises DataError for a file that cannot be read, or whose first bytes are of another encoding than UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and (other := other_encoding(line)) is not None:
                    raise DataError(f"{path}:1: the file is encoded in {other}; save it as UTF-8")
                if line.strip():
                    yield f"{path}:{number}", line.removesuffix(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def object_of(line: bytes, keys: Sequence[str], where: str, *, may_have: Sequence[str] = ()) -> dict[str, Any]:
    """The line as an object with exactly these keys, beside those that it ``may_have``. Raises DataError."""
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise JsonError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise JsonError(f"{where}: not a JSON object, but {kind_of(fields)}; write one object to a line")
    for key in keys:
        if key not in fields:
            raise DataError(f"{where}: field {key}: missing")
    for key in fields:
        if key not in keys and key not in may_have:
            raise DataError(f"{where}: field {key}: unknown; the fields are {', '.join([*keys, *may_have])}")
    return fields


def kind_of(value: Any) -> str:
    """What JSON calls a value of this type: ``a list``, ``null``."""
    return _NAMES[type(value)]


def check_text(value: Any, key: str, where: str, *, or_null: bool = False) -> None:
    """Raise DataError for anything but text that is not blank and that a tokenizer accepts.

    ``or_null`` is what a complaint offers besides; null itself is the caller's to let pass.
    """
    if not isinstance(value, str):
        remedy = (_IMAGE_REMEDIES if key == "image" else {}).get(type(value)) or _REMEDIES[type(value)]
        wanted = "text or null" if or_null else "text"
        raise DataError(f"{where}: field {key}: {wanted} expected, and it is {kind_of(value)}; {remedy}")
    if not value.strip():
        remedy = "fill it in, or write null" if or_null else "fill it in, or leave the line out"
        raise DataError(f"{where}: field {key}: text that is not empty expected, and it is blank; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {key}: holds half of a surrogate pair, which no tokenizer accepts") from error


def check_texts(value: Any, key: str, where: str, *, least: int, most: int | None = None, wanted: str) -> None:
    """Raise DataError for anything but a list of ``least`` to ``most`` texts; ``wanted`` is that in words."""
    if not isinstance(value, list):
        raise DataError(f"{where}: field {key}: {wanted} expected, and it is {kind_of(value)}")
    if len(value) < least or (most is not None and len(value) > most):
        raise DataError(f"{where}: field {key}: {wanted} expected, and it is a list of {len(value)}")
    for text in value:
        check_text(text, key, where)


def image_path(text: str, folder: Path, where: str) -> Path:
    """The file an image field names, with every link followed; it must lie inside ``folder``, itself without links.

    Raises DataError for a path that leaves the folder, ImageError for a file that is not there.
    """
    named = PurePosixPath(text)
    if named.is_absolute() or ".." in named.parts or "\0" in text:
        raise DataError(f"{where}: field image: {text!r} must be a path below the set's folder, without '..'")
    try:
        path = (folder / named).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ImageError(f"{where}: field image: {text!r} cannot be found: {error}") from error
    if not path.is_relative_to(folder) or not path.is_file():
        raise ImageError(f"{where}: field image: {text!r} is not a file inside {folder}")
    return path
