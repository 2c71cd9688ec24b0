"""What a user says about an OpenAI-compatible endpoint: its address, and further fields of requests."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from prism_megatron.errors import ConfigError
from prism_megatron.strict_json import parse_json

_SCHEMES = ("http", "https")
_RESERVED = {"messages", "model", "n", "stream"}


def check_address(url: str, *, key: str) -> None:
    """Raise ConfigError for anything but ``http://HOST/PATH``; ``key`` says where a key stands, which is not in it."""
    try:
        parts = urlsplit(url)
        named, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{_shown(url)!r} is no URL: {error}") from error
    if parts.scheme not in _SCHEMES:
        raise ConfigError(f"{_shown(url)!r} must be a URL such as http://HOST/v1")
    if not named or port == 0 or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"{parts.scheme}://{named}… must be a host and a path alone, such as http://HOST/v1; {key}")


def _shown(url: str) -> str:
    """An address without what may be a secret in it."""
    return url.partition("?")[0].partition("#")[0].rpartition("@")[2]


def request_fields(text: str | None, *, named: str) -> dict[str, Any]:
    """The JSON object that ``text`` is; ``named`` is what it is called.

    Raises ConfigError for anything else, and for fields that are not for it to say.
    """
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{named} {text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{named} {text!r} must be an object, such as '{{\"top_k\": -1}}'")
    if reserved := _RESERVED & found.keys():
        raise ConfigError(f"{named}: {min(reserved)} is not for it to say; leave it out")
    return found
