"""A request as it is kept beside its response, for whoever wants to know what was asked: without its pictures."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

_PICTURE = "data:image/"


def compact_request(body: Mapping[str, Any]) -> str:
    """The request as JSON; instead of a picture's data URL stands ``sha256:`` and the hash of the picture's file."""
    return json.dumps(_without_pictures(body), ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def _without_pictures(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_pictures(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_pictures(one) for one in value]
    if isinstance(value, str) and value.startswith(_PICTURE):
        return f"sha256:{hashlib.sha256(_file_in(value)).hexdigest()}"
    return value


def _file_in(url: str) -> bytes:
    head, _, data = url.partition(",")
    with suppress(ValueError):
        if head.endswith(";base64"):
            return base64.b64decode(data, validate=True)
    return url.encode("utf-8", errors="surrogatepass")
