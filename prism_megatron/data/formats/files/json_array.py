"""Where the records of one JSON array lie in its file, found without holding the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from prism_megatron.data.formats.files.base import Place
from prism_megatron.errors import DataError

_BLOCK_BYTES = 2**20
# A string, up to the end of what was read where it is not closed there, or a sign of structure.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[\[\]{},]', re.DOTALL)
_MOST_WORD_BYTES = 2**16
_BOM = b"\xef\xbb\xbf"


def array_places(path: Path) -> Iterator[Place]:
    """The elements of the array, in order; memory is that of the longest string. Raises DataError.

    Only brackets, commas and strings are looked at: whether an element is a record shows when it is read.
    """
    try:
        with path.open("rb") as file:
            scan = _Scan(file, path)
            for number, (offset, size) in enumerate(scan.elements(), start=1):
                yield Place(offset, size, number)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Scan:
    """One pass over a file. Offsets of tokens are those in the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._depth = 0
        self._start: int | None = None  # of the element under way
        self._may_be: str = "["  # what may come next outside elements: "[", "e" or "]", "e", "," or "]", nothing

    def elements(self) -> Iterator[tuple[int, int]]:
        """Offset and size of each element. Raises DataError where the array's own structure is broken."""
        for offset, token in self._tokens():
            if self._depth > 1:
                self._depth += (token in (b"{", b"[")) - (token in (b"}", b"]"))
                if self._depth == 1 and self._start is not None:
                    yield self._start, offset + 1 - self._start
                    self._start = None
            elif token == b"[" and self._may_be == "[":
                self._depth, self._may_be = 1, "e]"
            elif token == b"," and "," in self._may_be:
                self._may_be = "e"
            elif token == b"]" and "]" in self._may_be:
                self._depth, self._may_be = 0, ""
            elif token in (b"{", b"[") and "e" in self._may_be:
                self._depth, self._start, self._may_be = 2, offset, ",]"
            elif token not in (b"{", b"[", b"}", b"]", b",") and "e" in self._may_be:  # a string, a number, null
                yield offset, len(token)
                self._may_be = ",]"
            else:
                self._fail(offset)
        if self._may_be:
            raise DataError(f"{self._path}: the array is not closed: the file was cut, or is no JSON array of records")

    def _tokens(self) -> Iterator[tuple[int, bytes]]:
        """Structure, and outside elements also strings and bare words; strings inside elements are passed over."""
        data, base, more = b"", 0, _BLOCK_BYTES
        if self._file.read(len(_BOM)) == _BOM:
            base = len(_BOM)
        self._file.seek(base)
        while block := self._file.read(more):
            data += block
            end = 0  # of what is dealt with
            for match in _TOKEN.finditer(data):
                if match[1] == b"":
                    break
                if self._depth <= 1:
                    yield from self._words(data[end : match.start()], base + end)
                if match[1] is None or self._depth <= 1:
                    yield base + match.start(), match[0]
                end = match.end()
            rest = data[end:]
            if rest.isspace() or (self._depth > 1 and b'"' not in rest):
                end, rest = len(data), b""
            more = max(_BLOCK_BYTES, len(rest))  # a string of n bytes costs a few n
            base, data = base + end, rest
            if self._depth <= 1 and len(rest) > _MOST_WORD_BYTES and not rest.lstrip().startswith(b'"'):
                self._fail(base)
        if self._depth <= 1 and not data.startswith(b'"'):
            yield from self._words(data, base)

    def _words(self, gap: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
        word = gap.strip()
        if word:
            yield offset + gap.index(word), word

    def _fail(self, offset: int) -> None:
        if self._may_be == "[":
            raise DataError(
                f"{self._path}: a JSON array of records expected; a file with one object a line must end in .jsonl"
            )
        raise DataError(f"{self._path}: the array is malformed at byte {offset}")
