"""Files of a Hugging Face folder that nobody vouches for: what may be opened, and what their JSON may say."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from prism_megatron.config import json_file
from prism_megatron.errors import ConversionError

_HUB_REPOSITORY = "models--"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_HEADER_LENGTH_BYTES = 8


def member(folder: Path, name: str) -> Path:
    """The path of a file of ``folder``, links followed.

    A link must stay in the folder; in the hub's cache, whose snapshots are links to ``blobs``, in the cache of the same
    repository (``models--*``). Raises ConversionError for others, for what is no regular file (opening a pipe would
    wait for ever), and FileNotFoundError.
    """
    home = folder.resolve()
    try:
        path = (home / name).resolve(strict=True)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # a loop of links is either, by the version of Python
        raise ConversionError(f"{folder / name} cannot be opened: {error}") from error
    repository = home.parent.parent
    in_hub_cache = home.parent.name == "snapshots" and repository.name.startswith(_HUB_REPOSITORY)
    if not path.is_relative_to(repository if in_hub_cache else home):
        raise ConversionError(
            f"{folder / name} is a link to {path}, outside its folder, and is not followed; put the file itself there"
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConversionError(f"{folder / name} is no regular file")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. ConversionError for anything else, repeated keys and NaN or Infinity."""
    return json_file.read_object(path, error=ConversionError)


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header names a tensor twice: readers would disagree on which one is meant.

    The safetensors library, which has opened the file by then, checks sizes and offsets, but not this.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        json_file.parse_object(file.read(length).decode("utf-8"), path, error=ConversionError)


def describe(path: Path) -> str:
    """What a file that is not safetensors looks like, for an error message; empty where that cannot be said."""
    with path.open("rb") as file:
        first = file.read(len(_ZIP))
    if first == _ZIP or (first[:1] == _PICKLE and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "a pickle by another name, which can run code when opened and is not read"
    return ""
