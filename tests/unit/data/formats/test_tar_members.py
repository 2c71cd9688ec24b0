"""Members of tars lie where the standard library finds them, in all three ways in which tars are written."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise

import pytest

from prism_megatron.data.formats.files.tar_members import Member, members_of
from prism_megatron.errors import DataError
from tests.unit.data.formats.sets import add

NAMES = ("a.json", "ordner/ä.png", "x" * 99 + ".json", f"{'d' * 80}/{'f' * 60}.png", f"{'g' * 300}.json", "b.json")


def archive(form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for i, name in enumerate(NAMES):
            if form != tarfile.USTAR_FORMAT or len(name.rpartition("/")[2]) < 100:
                add(tar, name, bytes([i]) * (i * 300))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("c.json")
        link.type, link.linkname = tarfile.SYMTYPE, "y" * 200 if form != tarfile.USTAR_FORMAT else "a.json"
        tar.addfile(link)
        add(tar, "last.json", b"{}")
    return stream.getvalue()


def members(data: bytes) -> list[Member]:
    return list(members_of(lambda offset, count: data[offset : offset + count], len(data), "x.tar"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(form: int) -> None:
    data = archive(form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [one for one in tar.getmembers() if not one.isdir()]
    found = members(data)
    assert [(one.name, one.start, one.offset, one.size, one.is_file) for one in found] == [
        (one.name, one.offset, one.offset_data, one.size, one.isreg()) for one in expected
    ]
    assert all(before.end <= after.start for before, after in pairwise(found))


def test_sizes_beyond_eight_gigabytes_are_read() -> None:
    """Claim: both ways of writing them; what is there is less, so that the end is named and nothing is read."""
    member = tarfile.TarInfo("a.json")
    member.size = 10**11
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with pytest.raises(DataError, match=r"x\.tar: the archive ends inside a member"):
            members(member.tobuf(form))


def test_damage_is_named() -> None:
    data = archive(tarfile.PAX_FORMAT)
    for cut in range(0, members(data)[-1].end + 1, 100):
        with pytest.raises(DataError, match=r"x\.tar: the archive (ends inside|has no end mark: it was cut)"):
            members(data[:cut])
    part = members(data)[1]
    piece = data[part.start : part.end]
    (alone,) = members_of(lambda offset, count: piece[offset : offset + count], len(piece), "x.tar", is_whole=False)
    assert alone.name == part.name
    for spot in (0, 124, 148, 156):
        damaged = bytearray(data)
        damaged[spot] ^= 0xFF
        with pytest.raises(DataError, match=r"x\.tar: the header at byte 0 is damaged; is it an uncompressed tar\?"):
            members(bytes(damaged))
    with pytest.raises(DataError, match="uncompressed"):
        members(b"\x1f\x8b" + bytes(range(256)) * 4)
