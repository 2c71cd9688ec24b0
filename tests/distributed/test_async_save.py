"""Checkpoints that ranks write beside their steps: one commit, one error, and a kill that costs nothing older."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.checkpoints.folder import latest, step_folder
from prism_megatron.conversion.checkpoints.torch_dist_writer import write_data_file
from prism_megatron.engine import checkpoint
from prism_megatron.engine.runtime import World
from prism_megatron.errors import DiskError
from prism_megatron.testing import GlooWorld, RankError
from tests.distributed import tiny

WRITE = "prism_megatron.engine.saving.write_data_file"
History = list[tuple[float, float]]


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def train_and_save(world: World, root: Path, aside: bool) -> tuple[History, History]:
    """A step, a save, two steps, of which ``aside`` the first is taken before any rank may write its second block."""
    engine = tiny.build(world)
    first = tiny.train(engine, range(1))
    may_go_on = threading.Event()

    def held(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        for place, tensor in enumerate(tensors):
            assert place != 1 or not aside or may_go_on.wait(120)
            yield tensor

    def write(path: Path, tensors: Iterable[Tensor], count: Callable[[int], None]) -> list[int]:
        return write_data_file(path, held(tensors), count)

    with mock.patch(WRITE, write):
        saving = checkpoint.begin(
            step_folder(root, 1), {"policy": engine}, {}, models={"policy": tiny.FILES}, aside=aside
        )
        second = tiny.train(engine, range(1, 2))
        assert saving.is_written() == (not aside)
        assert latest(root) is None
        may_go_on.set()
        saving.finish()
    return first, second + tiny.train(engine, range(2, 3))


def test_a_save_beside_the_steps_is_one_at_once(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: at TP2·DP2 the folder is the same to the byte, and training is the same as well."""
    roots = {aside: tmp_path / str(aside) for aside in (False, True)}
    parallel = ParallelConfig(tp=2)
    found = {aside: gloo.run(train_and_save, root, aside, parallel=parallel) for aside, root in roots.items()}
    assert found[True] == found[False]
    at_once, aside = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (roots[False], roots[True])
    )
    assert at_once == aside
    assert sum(path.suffix == ".distcp" for path in at_once) == 4, "every rank has written a file of its own"


def fail_on_one(world: World, root: Path) -> tuple[str, list[str]]:
    """The error of this rank where the disk of rank 1 fills up in the middle, and what is left beside the older one."""
    engine = tiny.build(world)
    checkpoint.save(step_folder(root, 1), {"policy": engine}, {}, models={})

    def full(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        for place, tensor in enumerate(tensors):
            if place == 3 and world.rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield tensor

    def write(path: Path, tensors: Iterable[Tensor], count: Callable[[int], None]) -> list[int]:
        return write_data_file(path, full(tensors), count)

    with mock.patch(WRITE, write):
        saving = checkpoint.begin(step_folder(root, 2), {"policy": engine}, {}, models={}, aside=True)
        try:
            saving.finish()
        except DiskError as error:
            return str(error), sorted(path.name for path in root.iterdir()) if world.is_main else []
    return "saved", []


def test_a_full_disk_of_one_rank_is_everybodys_error(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: all ranks raise the same DiskError; what was written is removed, the older checkpoint stays."""
    results = gloo.run(fail_on_one, tmp_path, num_ranks=2)
    messages = [message for message, _ in results]
    assert messages[0] == messages[1]
    assert "step_000002" in messages[0] and messages[0].endswith("cannot be written: no space left on device")
    assert results[0][1] == ["step_000001"]


def be_killed(world: World, root: Path) -> None:
    """Save step 1, begin to save step 2 beside training, and let rank 1 be killed after its third block."""
    engine = tiny.build(world)
    tiny.train(engine, range(1))
    checkpoint.save(step_folder(root, 1), {"policy": engine}, {"step": 1}, models={})
    tiny.train(engine, range(1, 2))

    def killed(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        for place, tensor in enumerate(tensors):
            if place == 3 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield tensor

    def write(path: Path, tensors: Iterable[Tensor], count: Callable[[int], None]) -> list[int]:
        return write_data_file(path, killed(tensors), count)

    with mock.patch(WRITE, write):
        checkpoint.begin(step_folder(root, 2), {"policy": engine}, {"step": 2}, models={}, aside=True).finish()


def load_and_train(world: World, root: Path) -> tuple[History, dict[str, int]]:
    engine = tiny.build(world)
    folder = latest(root)
    assert folder is not None
    state = checkpoint.load(folder, {"policy": engine})
    history = tiny.train(engine, range(1, 2))
    checkpoint.save(step_folder(root, 2), {"policy": engine}, {"step": 2}, models={})
    return history, state


def test_a_kill_while_bytes_are_written_leaves_the_older_checkpoint(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: SIGKILL of one rank's process in the middle of its file: step 1 is the newest, loads, and goes on.

    The next save clears the leftover. The step that follows is that of a run that was never killed, 1e-6 relative:
    another layout sums in another order.
    """
    with pytest.raises((RankError, EOFError, ConnectionError)):
        gloo.run(be_killed, tmp_path, num_ranks=2)
    assert (tmp_path / ".step_000002.saving").is_dir()
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "step_000001"
    history, state = gloo.run(load_and_train, tmp_path, num_ranks=1)[0]
    assert state == {"step": 1}
    expected = gloo.run(train_and_save, tmp_path / "whole", False, num_ranks=1)[0][1][0]
    assert history[0] == pytest.approx(expected, rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002", "whole"]
