"""Features on disk: what is found is what was kept, or nothing; the folder never exceeds its bound."""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from prism_megatron.engine.vision.feature_files import FeatureFiles
from prism_megatron.errors import DiskError


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def features_of(number: int, rows: int = 8) -> Tensor:
    return torch.randn(3, rows, 16, generator=torch.Generator().manual_seed(number))


def size_of(folder: Path) -> int:
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except FileNotFoundError:
            continue
    return sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_kept_is_found_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Claim: also by another process's object, and another key finds nothing."""
    features = features_of(1).to(dtype)
    FeatureFiles(tmp_path, max_bytes=10**7).keep(key_of(1), features)
    other = FeatureFiles(tmp_path, max_bytes=10**7)
    found = other.find(key_of(1))
    assert found is not None and found.dtype is dtype and torch.equal(found, features)
    assert other.find(key_of(2)) is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def take_anothers(path: Path) -> None:
    other = FeatureFiles(path.parent.parent, max_bytes=10**7)
    other.keep(key_of(7), features_of(7))
    path.write_bytes(other.path_of(key_of(7)).read_bytes())


def reshape(path: Path) -> None:
    held = load(path.read_bytes())
    path.write_bytes(save(held | {"features": held["features"].reshape(3, 4, 32)}))


@pytest.mark.parametrize(
    "damage",
    [
        reshape,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(os.urandom(500)),
        flip,
        take_anothers,
    ],
    ids=["another shape", "cut", "empty", "noise", "one bit", "another image's"],
)
def test_a_damaged_file_is_a_miss_and_is_written_anew(damage: Callable[[Path], None], tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, max_bytes=10**7)
    files.keep(key_of(1), features_of(1))
    damage(files.path_of(key_of(1)))
    assert files.find(key_of(1)) is None
    assert not files.path_of(key_of(1)).exists()
    files.keep(key_of(1), features_of(1))
    assert files.find(key_of(1)) is not None


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    """Claim: at most so many bytes at any time; of 40 images those stay that were used last."""
    one = FeatureFiles(tmp_path / "size", max_bytes=10**7)
    one.keep(key_of(0), features_of(0))
    bound = size_of(tmp_path / "size") * 12
    files = FeatureFiles(tmp_path / "kept", max_bytes=bound, num_shelves=1)
    for number in range(40):
        files.keep(key_of(number), features_of(number))
        assert size_of(tmp_path / "kept") <= bound
        path = files.path_of(key_of(number))
        os.utime(path, (number, number))
        found = files.find(key_of(0))  # used all the time, so it stays
        assert found is not None
    kept = {number for number in range(40) if files.path_of(key_of(number)).exists()}
    assert kept == {0, *range(40 - len(kept) + 1, 40)}
    assert len(kept) >= 8


def write_and_read(folder: Path, bound: int, writers: int, seed: int) -> None:
    """What one of several processes does; it fails by its exit status."""
    files = FeatureFiles(folder, max_bytes=bound, writers=writers, num_shelves=2)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed)).tolist()
    for number in order * 3:
        found = files.find(key_of(number))
        if found is None:
            files.keep(key_of(number), features_of(number))
        elif not torch.equal(found, features_of(number)):
            os._exit(3)
        if size_of(folder) > bound:
            os._exit(4)
    if files.failure is not None:
        os._exit(5)


def test_many_writers_never_read_another_or_exceed_the_bound(tmp_path: Path) -> None:
    """Claim: four processes that write, read and remove the same files in a folder too small for them all."""
    context, bound = mp.get_context("fork"), 40 * 1900
    processes = [context.Process(target=write_and_read, args=(tmp_path, bound, 4, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert not list(tmp_path.rglob("*.part"))


def test_what_a_killed_writer_left_is_removed_in_time(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, max_bytes=10**7, num_shelves=1)
    files.keep(key_of(1), features_of(1))
    shelf = files.path_of(key_of(1)).parent
    for name, age in (("old", 7200), ("new", 60)):
        part = shelf / f".{name}.part"
        part.write_bytes(b"x")
        os.utime(part, (part.stat().st_mtime - age,) * 2)
    FeatureFiles(tmp_path, max_bytes=10**7, num_shelves=1).keep(key_of(2), features_of(2))
    assert [(shelf / f".{name}.part").exists() for name in ("old", "new")] == [False, True]


def test_a_full_disk_ends_the_keeping_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FeatureFiles(tmp_path, max_bytes=10**7)
    files.keep(key_of(1), features_of(1))

    def full(_path: Path, _content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert files.keep(key_of(2), features_of(2))
    assert files.failure is not None and "No space left" in files.failure
    assert files.find(key_of(1)) is not None and files.find(key_of(2)) is None


def test_a_folder_that_fails_once_is_written_to_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: three failures in a row end the keeping, two and then a success do not."""
    write, left = Path.write_bytes, [True, True, False, True, True, True]

    def flaky(path: Path, content: bytes) -> int:
        if left.pop(0):
            raise OSError(116, "Stale file handle")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", flaky)
    files = FeatureFiles(tmp_path, max_bytes=10**7)
    for number in range(5):
        files.keep(key_of(number), features_of(number))
        assert files.failure is None
    files.keep(key_of(5), features_of(5))
    assert files.failure is not None and "Stale file handle" in files.failure
    assert [files.find(key_of(number)) is not None for number in range(6)] == [False, False, True] + [False] * 3


def test_features_that_the_bound_has_no_room_for_are_not_kept(tmp_path: Path) -> None:
    """Claim: and whoever asks is told so, where a smaller one fits."""
    files = FeatureFiles(tmp_path, max_bytes=20_000, num_shelves=1)
    assert files.keep(key_of(1), features_of(1))
    assert not files.keep(key_of(2), features_of(2, rows=64))
    assert files.find(key_of(1)) is not None and files.find(key_of(2)) is None


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        FeatureFiles(tmp_path / "file" / "folder", max_bytes=10**7)


def test_making_room_leaves_what_another_has_under_way(tmp_path: Path) -> None:
    """Claim: an older file that is still being written stays, however little room there is, and counts as taken."""
    files = FeatureFiles(tmp_path, max_bytes=12 * 1900, num_shelves=1)
    files.keep(key_of(0), features_of(0))
    part = files.path_of(key_of(0)).parent / f".{key_of(99)}.00000000.part"
    part.write_bytes(bytes(4000))
    os.utime(part, (part.stat().st_mtime - 60,) * 2)
    for number in range(1, 40):
        files.keep(key_of(number), features_of(number))
        assert part.exists() and size_of(tmp_path) <= 12 * 1900
