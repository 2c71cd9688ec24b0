"""What befalls a run, beside the loss of processes (``processes.py``)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prism_megatron.conversion.checkpoints.folder import latest

DISK_MIB = 512
_BALLAST = "ballast"
_STEP = 1 << 20


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of its own in memory, which is gone afterwards. For root. Raises OSError where it cannot be had."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)
        place.rmdir()


def may_mount(folder: Path) -> bool:
    """Whether this user may have such a disk."""
    try:
        with small_disk(folder / "may-mount"):
            return True
    except OSError:
        return False


def fill(disk: Path) -> None:
    """Leave no byte, as long as nothing is removed."""
    with (disk / _BALLAST).open("wb") as file:
        end, step = 0, _STEP
        while step:
            try:
                os.posix_fallocate(file.fileno(), end, step)
                end += step
            except OSError:
                step //= 2


def make_room(disk: Path) -> None:
    """Undo ``fill``."""
    with suppress(FileNotFoundError):
        (disk / _BALLAST).unlink()


def damage(output: Path, *, choice: float, share: float) -> str | None:
    """Cut a file of the newest checkpoint short, and say which; None where there is no older one to fall back to."""
    root = output / "checkpoints"
    if len(list(root.glob("step_*"))) < 2:
        return None
    folder = latest(root)
    assert folder is not None
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[int(choice * len(files))]
    size = path.stat().st_size
    os.truncate(path, int(share * size))
    return f"{path.relative_to(output)} cut to {int(share * size)} of {size} bytes"
