"""A checkpoint that is written beside the steps, on one rank (``tests/distributed/test_async_save.py`` has several)."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from prism_megatron.conversion.checkpoints.folder import latest, step_folder
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.checkpoints.torch_dist_writer import write_data_file
from prism_megatron.engine import checkpoint, saving
from prism_megatron.engine.pieces import share_out
from prism_megatron.engine.runtime import World
from prism_megatron.errors import CheckpointError, DiskError
from tests.distributed import tiny
from tests.waiting import wait_for


@pytest.mark.parametrize(
    ("sizes", "ranks", "owners"),
    [
        ([5, 5, 5, 5], 2, [0, 1, 0, 1]),
        ([1, 9, 1, 1], 2, [1, 0, 1, 1]),
        ([3, 2, 2, 1, 4], 3, [1, 2, 2, 1, 0]),
        ([7], 4, [0]),
        ([], 2, []),
    ],
)
def test_shares_are_about_equal(sizes: list[int], ranks: int, owners: list[int]) -> None:
    """Claim: the largest first, each to whoever has least: by hand."""
    assert share_out(sizes, ranks) == owners


class Gate:
    """Holds a writing thread after its first block until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.taken = 0
        """blocks that were given to be written"""

    def write(self, path: Path, tensors: Iterable[Tensor], count: Callable[[int], None]) -> list[int]:
        return write_data_file(path, self._held(tensors), count)

    def _held(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        for place, tensor in enumerate(tensors):
            if place == 1:
                self.reached.set()
                assert self.open.wait(60)
            self.taken += 1
            yield tensor


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(saving, "write_data_file", made.write)
    yield made
    made.open.set()


def test_steps_go_on_while_bytes_are_written(world: World, tmp_path: Path, gate: Gate) -> None:
    """Claim: what is committed is the state at the beginning, to the byte, whatever was trained meanwhile.

    Counts and the caller's state are those of then too; and nothing is a checkpoint before ``finish``.
    """
    engine = tiny.build(world)
    tiny.train(engine, range(1))
    gate.open.set()
    checkpoint.save(step_folder(tmp_path / "at once", 1), {"policy": engine}, {"n": [1]}, models={"policy": tiny.FILES})
    gate.open.clear()
    gate.reached.clear()
    state = {"n": [1]}
    folder = step_folder(tmp_path / "aside", 1)
    under_way = checkpoint.begin(folder, {"policy": engine}, state, models={"policy": tiny.FILES}, aside=True)
    assert gate.reached.wait(60)
    tiny.train(engine, range(1, 3))
    state["n"].append(2)
    assert not under_way.is_written()
    assert latest(folder.parent) is None
    gate.open.set()
    under_way.finish()
    assert under_way.is_written()
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "at once", tmp_path / "aside")
    )
    assert first == second


def test_an_abandoned_save_ends_and_is_no_checkpoint(world: World, tmp_path: Path, gate: Gate) -> None:
    """Claim: a failing run does not wait for the rest, and the next save clears what was left."""
    engine = tiny.build(world)
    folder = step_folder(tmp_path, 1)
    under_way = checkpoint.begin(folder, {"policy": engine}, {}, models={}, aside=True)
    assert gate.reached.wait(60)
    closer = threading.Thread(target=under_way.abandon)
    closer.start()
    wait_for(under_way._own._abandoned.is_set)
    gate.open.set()
    closer.join(60)
    assert under_way.is_written() and gate.taken == 2, "the block under way is the last one"
    assert latest(tmp_path) is None
    checkpoint.save(step_folder(tmp_path, 2), {"policy": engine}, {}, models={})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


def test_a_disk_that_fills_up_beside_the_steps_is_told_at_the_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: the DiskError of a save at once, raised by ``finish``, and room is made again."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("prism_megatron.conversion.checkpoints.torch_dist_writer.torch.save", full)
    under_way = checkpoint.begin(step_folder(tmp_path, 1), {"policy": tiny.build(world)}, {}, models={}, aside=True)
    with pytest.raises(DiskError, match="cannot be written: no space left on device"):
        under_way.finish()
    assert list(tmp_path.iterdir()) == []


def test_what_ranks_do_not_write_is_not_committed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: a tensor of which a part was left out is noticed before the rename; what was there before stays."""
    engine = tiny.build(world)
    folder = step_folder(tmp_path, 1)
    checkpoint.save(folder, {"policy": engine}, {"first": True}, models={})
    found = engine.pieces()
    monkeypatch.setattr("prism_megatron.engine.pieces.BLOCK_BYTES", 500)
    parts = engine.pieces()
    assert len(parts) > len(found)
    monkeypatch.setattr(engine, "pieces", lambda: parts[:5] + parts[6:])
    with pytest.raises(CheckpointError, match="do not cover the shape"):
        checkpoint.save(folder, {"policy": engine}, {}, models={})
    assert TorchDistFolder(folder).document["state"] == {"first": True}
