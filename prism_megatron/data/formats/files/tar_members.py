"""Members of an uncompressed tar with the places of their bytes, from headers alone.

The standard library's reader hides where a member's own extra headers begin, and reads damaged archives as shorter
ones. Names of any length are understood in both ways that archives have for them (GNU's and POSIX's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prism_megatron.errors import DataError

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_FOLDER, _LONG_NAME, _LONG_LINK, _EXTRA, _EXTRA_FOR_ALL = b"5", b"L", b"K", b"x", b"g"
_MAX_HEADER_BYTES = 2**20
Read = Callable[[int, int], bytes]
"""(offset, count) to at most so many bytes."""


class Member(NamedTuple):
    """``start`` is the offset of its first header and ``end`` that after its padding; between them lie its data."""

    name: str
    start: int
    offset: int
    size: int
    end: int
    is_file: bool


def members_of(read: Read, total: int, where: str, *, is_whole: bool = True) -> Iterator[Member]:
    """All members but folders, in order. ``is_whole=False`` is for members cut out of an archive, without its end mark.

    Raises DataError, naming ``where``, for damage, and for an archive whose end mark is missing: one that was cut
    between two members looks whole but for that.
    """
    position, start = 0, 0
    name: str | None = None
    extra: dict[str, str] = {}
    while position < total:
        header = read(position, BLOCK)
        if len(header) == BLOCK and not any(header):
            return
        size = _checked_size(header, position, where)
        kind, offset = header[156:157], position + BLOCK
        if kind not in (_LONG_NAME, _LONG_LINK, _EXTRA, _EXTRA_FOR_ALL) and "size" in extra:
            size = _whole(extra["size"], 10, position, where)
        end = min(total, offset + -(-size // BLOCK) * BLOCK)
        if offset + size > total:
            raise DataError(f"{where}: the archive ends inside a member, at byte {total}; copy the file again")
        if kind == _LONG_NAME:
            name = _text(_header_data(read, offset, size, where).rstrip(b"\0"))
        elif kind == _EXTRA:
            extra = _extra_fields(_header_data(read, offset, size, where), position, where)
        elif kind not in (_LONG_LINK, _EXTRA_FOR_ALL):
            if kind != _FOLDER:
                yield Member(extra.get("path") or name or _own_name(header), start, offset, size, end, kind in _REGULAR)
            name, extra, start = None, {}, end
        position = end
    if is_whole:
        raise DataError(
            f"{where}: the archive has no end mark: it was cut, or never finished; copy the file again, or if all of "
            f"it is there: head -c {2 * BLOCK} /dev/zero >> {where}"
        )


def _header_data(read: Read, offset: int, size: int, where: str) -> bytes:
    if size > _MAX_HEADER_BYTES:
        raise DataError(f"{where}: a header of {size} bytes at byte {offset}; it is no archive of records")
    return read(offset, size)


def _checked_size(header: bytes, position: int, where: str) -> int:
    if len(header) < BLOCK:
        raise DataError(f"{where}: the archive ends inside a header, at byte {position}; copy the file again")
    found = _whole(header[148:156].split(b"\0")[0].decode("latin-1").strip(), 8, position, where)
    if found != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise DataError(f"{where}: the header at byte {position} is damaged; is it an uncompressed tar?")
    field = header[124:136]
    if field[0] & 0x80:  # beyond 8 GiB sizes are binary
        return int.from_bytes(field[1:], "big")
    return _whole(field.split(b"\0")[0].decode("latin-1").strip() or "0", 8, position, where)


def _whole(text: str, base: int, position: int, where: str) -> int:
    if not text.isascii() or not text.isdigit() or (base == 8 and not set(text) <= set("01234567")) or len(text) > 20:
        raise DataError(f"{where}: the header at byte {position} is damaged; is it an uncompressed tar?")
    return int(text, base)


def _extra_fields(data: bytes, position: int, where: str) -> dict[str, str]:
    """``17 path=long name\\n`` and so on: each line begins with its own length."""
    fields: dict[str, str] = {}
    while data.strip(b"\0"):
        length, separator, _ = data.partition(b" ")
        count = _whole(length.decode("latin-1"), 10, position, where) if separator else 0
        key, equals, value = data[len(length) + 1 : count].rstrip(b"\n").partition(b"=")
        if count <= len(length) + 1 or count > len(data) or not equals:
            raise DataError(f"{where}: the header at byte {position} is damaged; is it an uncompressed tar?")
        fields[_text(key)] = _text(value)
        data = data[count:]
    return fields


def _own_name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    is_posix = header[257:263] == b"ustar\0"
    return _text(prefix + b"/" + name if is_posix and prefix else name)


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="surrogateescape")
