"""How a checkpoint is committed, found and taken up, on one rank.

``tests/distributed`` has other layouts, kills and hostile files.
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_megatron import disk
from prism_megatron.conversion.checkpoints.folder import COMPANIONS_FOLDER, STATE_FILE, latest, step_folder
from prism_megatron.engine import checkpoint, saving
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.offload import Offload
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.runtime import World
from prism_megatron.errors import DiskError
from tests.distributed import tiny


def held_bytes(engine: MegatronEngine) -> int:
    """Of gradient buffers and moments."""
    assert engine.optimizer is not None
    held = [buffer.grad_data for chunk in engine._chunks for buffer in chunk.buffers]
    for inner in inner_optimizers(engine.optimizer):
        held += [state[moment] for state in inner.state.values() for moment in ("exp_avg", "exp_avg_sq")]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def test_the_latest_is_the_newest_that_was_committed(tmp_path: Path) -> None:
    """Claim: leftovers of saves and folders without their state are none; a checkpoint itself is its own latest."""
    (tmp_path / "step_000009").mkdir()
    for leftover in (".step_000008.saving", ".step_000004.replaced"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / STATE_FILE).touch()
    assert latest(tmp_path) is None
    for step in (30, 4, 200):
        step_folder(tmp_path, step).mkdir()
        (step_folder(tmp_path, step) / STATE_FILE).touch()
    newest = tmp_path / "step_000200"
    assert latest(tmp_path) == latest(newest) == newest


@pytest.mark.parametrize("again", [False, True], ids=["first save", "save over the same step"])
def test_a_commit_flushes_then_renames_then_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Claim: contents are on the disk before they have their name, and an older save steps aside until they have it."""
    calls = []

    def recorded(function: Any, verb: str) -> Any:
        def call(*paths: Path) -> Any:
            calls.append((verb, *(path.name for path in paths)))
            return function(*paths)

        return call

    hidden, folder = tmp_path / ".step.saving", tmp_path / "step"
    (hidden / COMPANIONS_FOLDER).mkdir(parents=True)
    if again:
        folder.mkdir()
    monkeypatch.setattr(saving, "flush_folder", recorded(lambda _path: None, "flush"))
    monkeypatch.setattr(Path, "rename", recorded(Path.rename, "rename"))
    monkeypatch.setattr(shutil, "rmtree", recorded(shutil.rmtree, "remove"))
    saving.commit(hidden, folder)
    aside = [("rename", "step", ".step.replaced")] if again else []
    assert calls == [
        ("flush", COMPANIONS_FOLDER),
        ("flush", ".step.saving"),
        *aside,
        ("rename", ".step.saving", "step"),
        ("flush", tmp_path.name),
        *([("remove", ".step.replaced")] if again else []),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_save_removes_what_killed_ones_left(world: World, tmp_path: Path) -> None:
    for leftover in (".step_000001.saving", ".step_000003.replaced"):
        (tmp_path / leftover / COMPANIONS_FOLDER).mkdir(parents=True)
    folder = step_folder(tmp_path, 2)
    checkpoint.save(folder, {"policy": tiny.build(world)}, {}, models={})
    assert list(tmp_path.iterdir()) == [folder]


def test_a_save_leaves_offloaded_state_where_it_is(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: with offload no byte of gradients and moments comes back for a save or a load, not even for a while.

    What is saved is what an engine without offload saves, and an engine that is loaded goes on as that one does.
    """
    kept, put_away, loaded = (
        tiny.build(world, optimizer=dataclasses.replace(tiny.OPTIMIZER, offload=offload))
        for offload in (False, True, True)
    )
    for engine in (kept, put_away):
        tiny.train(engine, range(1))
    tiny.train(loaded, range(2))
    assert held_bytes(put_away) == 0 < held_bytes(kept), "blind: nothing would ever be held"
    checkpoint.save(step_folder(tmp_path, 1), {"policy": kept}, {}, models={})
    with monkeypatch.context() as patched:
        patched.setattr(Offload, "restore", lambda _self: pytest.fail("state is brought back"))
        checkpoint.save(step_folder(tmp_path, 2), {"policy": put_away}, {}, models={})
        checkpoint.load(step_folder(tmp_path, 2), {"policy": loaded})
    assert held_bytes(put_away) == held_bytes(loaded) == 0
    first, second = (step_folder(tmp_path, step) / "__0_0.distcp" for step in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    expected = tiny.train(kept, range(1, 3))
    assert tiny.train(put_away, range(1, 3)) == tiny.train(loaded, range(1, 3)) == expected


def test_the_room_that_is_asked_for_is_what_is_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: weights, masters and moments are counted, each once. Headers are not, 1.3 KB a tensor."""
    asked: list[int] = []
    monkeypatch.setattr(checkpoint, "check_room", lambda _folder, needed, *, what: asked.append(needed))  # noqa: ARG005
    engine = tiny.build(world)
    tiny.train(engine, range(1))
    folder = step_folder(tmp_path, 1)
    checkpoint.save(folder, {"policy": engine}, {}, models={})
    written = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    assert 0.85 * written < asked[0] <= written


def test_a_save_without_room_writes_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _folder: 4096)
    with pytest.raises(DiskError, match=r"step_000001 needs .* no space left on device"):
        checkpoint.save(step_folder(tmp_path, 1), {"policy": tiny.build(world)}, {}, models={})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_in_a_save_is_one_line(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: what the operating system raises becomes ours, and its leftovers go."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("prism_megatron.conversion.checkpoints.torch_dist_writer.torch.save", full)
    with pytest.raises(DiskError, match="cannot be written: no space left on device"):
        checkpoint.save(step_folder(tmp_path, 1), {"policy": tiny.build(world)}, {}, models={})
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_engine_goes_on_where_the_saved_one_stood(world: World, tmp_path: Path) -> None:
    """Claim: to the bit, after a step that was skipped too: then Adam and the schedule have other counts."""
    saved = tiny.build(world)
    tiny.train(saved, range(2))
    saved.zero_grad()
    next(saved.modules[0].parameters()).main_grad.view(-1)[0] = torch.nan
    assert not saved.step().updated
    saved.expert_layout = "hub"
    folder = step_folder(tmp_path, 3)
    checkpoint.save(folder, {"policy": saved}, {"data": 3}, models={"policy": tiny.FILES})

    loaded = tiny.build(world)
    assert checkpoint.load(folder, {"policy": loaded}) == {"data": 3}
    assert loaded.progress() == saved.progress() == {"steps_taken": 3, "adam_step": 2}
    assert loaded.expert_layout == "hub"
    assert tiny.train(loaded, range(3, 5)) == tiny.train(saved, range(3, 5))
    expected = tiny.exported(saved)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny.exported(loaded).items())


def test_an_engine_saved_before_its_first_update_has_had_none(world: World, tmp_path: Path) -> None:
    """Claim: Adam's count stays 0, so that the bias of its first moments is corrected as in a run that went on."""
    saved, loaded = tiny.build(world), tiny.build(world)
    folder = step_folder(tmp_path, 0)
    checkpoint.save(folder, {"policy": saved}, {}, models={"policy": tiny.FILES})
    tiny.train(loaded, range(1))
    checkpoint.load(folder, {"policy": loaded})
    assert loaded.progress() == {"steps_taken": 0, "adam_step": 0}
    assert tiny.train(loaded, range(2)) == tiny.train(saved, range(2))
