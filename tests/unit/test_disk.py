"""A disk that takes no more is one line that names the file (blind spot: a real full disk, which integration has)."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_megatron import disk
from prism_megatron.disk import check_room, disk_error, free_bytes, writing
from prism_megatron.errors import DiskError


def test_what_the_system_refuses_names_the_file() -> None:
    with pytest.raises(DiskError) as caught, writing(Path("runs/a")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == "runs/a cannot be written: no space left on device"
    with pytest.raises(KeyError), writing(Path("runs/a")):
        raise KeyError("not of the disk")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/x"), "runs/a/x cannot be written: no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "runs cannot be written: disk quota exceeded"),
        (OSError(errno.EROFS, "Read-only file system"), "runs cannot be written: read-only file system"),
        (RuntimeError("IoError: No space left on device (os error 28)"), "runs cannot be written: no space left"),
        (DiskError("as it was"), "as it was"),
    ],
)
def test_errors_of_a_full_disk_are_known(error: Exception, message: str) -> None:
    found = disk_error(error, Path("runs"))
    assert found is not None and str(found).startswith(message)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "No such file"), ValueError("bad"), RuntimeError("collective")]
)
def test_other_errors_are_not(error: Exception) -> None:
    assert disk_error(error, Path()) is None


def test_a_library_that_does_not_say_why_is_believed_where_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _folder: 4096)
    found = disk_error(RuntimeError("PytorchStreamWriter failed writing file data/0"), Path("runs"))
    assert str(found) == "runs cannot be written: no space left on device"


def test_room_is_asked_for_before_a_byte_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage: Any = lambda _folder: SimpleNamespace(free=10**6)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_room(tmp_path / "not" / "there", 10**6, what="x")
    with pytest.raises(DiskError, match=r"x needs 2\.0 GB, and .* has 1\.0 MB left: no space left on device"):
        check_room(tmp_path, 2 * 10**9, what="x")


def test_free_room_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.2)
