"""Checkpoints: exact continuation in other layouts, one atomic commit, and nothing unpickled that could run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.checkpoints import folder as checkpoint_folder
from prism_megatron.conversion.checkpoints.folder import latest, step_folder
from prism_megatron.engine import checkpoint, saving
from prism_megatron.engine.runtime import World
from prism_megatron.errors import CheckpointError
from prism_megatron.testing import GlooWorld
from tests.distributed import checkpoint_ranks, tiny

History = list[tuple[float, float]]
TP2_PP2 = ParallelConfig(tp=2, pp=2)


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def train_and_save(world: World, root: Path, dtype: torch.dtype) -> tuple[History, float]:
    """Two steps, a save of two roles, two more steps; their history and the seconds of the first save."""
    engines = {name: tiny.build(world, name=name, dtype=dtype) for name in ("policy", "discriminator")}
    for engine in engines.values():
        tiny.train(engine, range(2))
    started = time.monotonic()
    checkpoint.save(step_folder(root, 2), engines, {"step": 2}, models=dict.fromkeys(engines, tiny.FILES))
    return tiny.train(engines["policy"], range(2, 4)), time.monotonic() - started


def load_and_train(world: World, folder: Path, dtype: torch.dtype) -> tuple[History, dict[str, Any]]:
    engines = {name: tiny.build(world, name=name, dtype=dtype) for name in ("policy", "discriminator")}
    state = checkpoint.load(folder, engines)
    return tiny.train(engines["policy"], range(2, 4)), state


def error_of_load(world: World, folder: Path, name: str) -> str:
    try:
        checkpoint.load(folder, {name: tiny.build(world, name=name)})
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.fixture(scope="module")
def saved(gloo: GlooWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History]:
    """A checkpoint of step 2 made at TP2-PP2, and how the run that made it went on."""
    root = tmp_path_factory.mktemp("run")
    history, seconds = gloo.run(train_and_save, root, torch.float32, parallel=TP2_PP2)[0]
    print(f"first save of two roles on 4 ranks: {seconds:.2f} s")
    return step_folder(root, 2), history


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (4, TP2_PP2),
        (2, ParallelConfig()),
        (4, ParallelConfig(tp=4, sp="on")),
        (2, ParallelConfig(pp=2, vpp=2)),
        (4, ParallelConfig(tp=2)),
    ],
    ids=["TP2-PP2", "TP1-DP2", "TP4-SP", "PP2-VPP2", "TP2-DP2"],
)
def test_any_layout_goes_on_as_if_never_stopped(
    gloo: GlooWorld, saved: tuple[Path, History], ranks: int, parallel: ParallelConfig
) -> None:
    """Claim: saved at TP2-PP2, the next losses and norms in another layout are those of the uninterrupted run.

    Tolerance 1e-6 relative on losses and 2e-6 on norms (sums in another order); the same layout is exact to the bit.
    """
    folder, expected = saved
    results = gloo.run(load_and_train, folder, torch.float32, num_ranks=ranks, parallel=parallel)
    for history, state in results:
        assert state == {"step": 2}
        for (loss, norm), (expected_loss, expected_norm) in zip(history, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=2e-6)
    if parallel == TP2_PP2:
        assert results[0][0] == expected


def test_without_the_distributed_optimizer_too(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: replicated optimizer state, in bf16 with fp32 masters, reshards and continues alike (bf16: 1e-3)."""
    replicated = ParallelConfig(tp=2, pp=2, distributed_optimizer=False)
    expected, _ = gloo.run(train_and_save, tmp_path, torch.bfloat16, parallel=replicated)[0]
    folder = step_folder(tmp_path, 2)
    again = gloo.run(load_and_train, folder, torch.bfloat16, parallel=replicated)[0][0]
    assert again == expected
    other = ParallelConfig(distributed_optimizer=False)
    moved = gloo.run(load_and_train, folder, torch.bfloat16, num_ranks=2, parallel=other)[0][0]
    for mine, theirs in zip(moved, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


class _Killed(BaseException):
    """Stands for a SIGKILL: nothing below the save may catch it and clean up."""


def die_in_save(world: World, root: Path, moment: str) -> None:
    engine = tiny.build(world)
    tiny.train(engine, range(1))

    where = (checkpoint, "write_state") if moment == "tensors are written" else (saving, "commit")
    with mock.patch.object(*where, side_effect=_Killed), contextlib.suppress(_Killed):
        checkpoint.save(step_folder(root, 4), {"policy": engine}, {"step": 4}, models={})


@pytest.mark.parametrize("moment", ["tensors are written", "all is written but the rename"])
def test_a_killed_save_leaves_the_one_before(
    gloo: GlooWorld, saved: tuple[Path, History], tmp_path: Path, moment: str
) -> None:
    """Claim: a save that dies leaves a leftover that is never taken for a checkpoint and that the next save removes."""
    folder = tmp_path / saved[0].name
    shutil.copytree(saved[0], folder)
    gloo.run(die_in_save, tmp_path, moment, num_ranks=1)
    assert [path.name for path in tmp_path.iterdir() if path != folder] == [".step_000004.saving"]
    assert latest(tmp_path) == folder
    history, _ = gloo.run(load_and_train, folder, torch.float32, num_ranks=1)[0]
    assert history[0][0] == pytest.approx(saved[1][0][0], rel=1e-6)
    gloo.run(train_and_save, tmp_path, torch.float32, num_ranks=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


class _Payload:
    """A pickle that would create a file when read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_hostile_checkpoint_is_refused_before_anything_runs(
    gloo: GlooWorld, saved: tuple[Path, History], tmp_path: Path
) -> None:
    """Claim: code in the index or in common.pt is named in the error and never run, on any rank."""
    marker = tmp_path / "ran"
    for file in (checkpoint_folder.INDEX_FILE, checkpoint_folder.OBJECTS_FILE):
        folder = tmp_path / f"with{file}" / "step_000002"
        shutil.copytree(saved[0], folder)
        if file == checkpoint_folder.INDEX_FILE:
            (folder / file).write_bytes(pickle.dumps(_Payload(marker)))
        else:
            torch.save({"x": _Payload(marker)}, folder / file)
        for message in gloo.run(error_of_load, folder, "policy", num_ranks=2):
            assert f"{os.system.__module__}.system" in message and file in message
    assert not marker.exists()


def test_code_in_a_data_file_is_never_run(gloo: GlooWorld, saved: tuple[Path, History], tmp_path: Path) -> None:
    """Claim: an object in place of a tensor is refused on every rank, whichever of them reads it, and not run."""
    folder = tmp_path / "step_000002"
    shutil.copytree(saved[0], folder)
    archive = io.BytesIO()
    torch.save(_Payload(tmp_path / "ran"), archive)
    index = pickle.loads((folder / checkpoint_folder.INDEX_FILE).read_bytes())
    for where, place in index.storage_data.items():
        if where.fqn == "policy.decoder.layers.3.input_layernorm.weight":  # of the last pipeline stage
            with (folder / place.relative_path).open("ab") as file:
                place.offset, place.length = file.tell(), len(archive.getvalue())
                file.write(archive.getvalue())
    (folder / checkpoint_folder.INDEX_FILE).write_bytes(pickle.dumps(index))
    for message in gloo.run(error_of_load, folder, "policy", num_ranks=2, parallel=ParallelConfig(pp=2)):
        assert message.startswith(f"{folder}/__") and "no tensor that torch.save wrote (UnpicklingError" in message
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_told_in_one_line(gloo: GlooWorld, saved: tuple[Path, History], tmp_path: Path) -> None:
    """Claim: a missing file, a damaged index or JSON, and an unknown role are CheckpointErrors that name the file."""
    for name in (checkpoint_folder.STATE_FILE, checkpoint_folder.INDEX_FILE, checkpoint_folder.OBJECTS_FILE):
        folder = tmp_path / f"without{name}" / "step_000002"
        shutil.copytree(saved[0], folder)
        (folder / name).unlink()
        assert f"{name} is missing" in gloo.run(error_of_load, folder, "policy", num_ranks=1)[0]
    damaged = tmp_path / "step_000002"
    shutil.copytree(saved[0], damaged)
    (damaged / checkpoint_folder.INDEX_FILE).write_bytes((saved[0] / checkpoint_folder.INDEX_FILE).read_bytes()[:500])
    assert ".metadata is damaged" in gloo.run(error_of_load, damaged, "policy", num_ranks=1)[0]
    (damaged / checkpoint_folder.STATE_FILE).write_text("{")
    assert "state.json is damaged" in gloo.run(error_of_load, damaged, "policy", num_ranks=1)[0]
    assert "not reference" in gloo.run(error_of_load, saved[0], "reference", num_ranks=1)[0]


def test_state_is_json_and_objects_are_empty(saved: tuple[Path, History]) -> None:
    """Claim: beside the tensors stands readable JSON with versions, and common.pt holds nothing."""
    document = json.loads((saved[0] / checkpoint_folder.STATE_FILE).read_text())
    assert document["engines"]["policy"] == {"steps_taken": 2, "adam_step": 2}
    assert document["torch"] == torch.__version__
    assert torch.load(io.BytesIO((saved[0] / checkpoint_folder.OBJECTS_FILE).read_bytes()), weights_only=True) == {}


def save_experts(world: World, folder: Path) -> tuple[float, float]:
    engine = checkpoint_ranks.build(world, "discriminator")
    checkpoint_ranks.step(engine, 0)
    checkpoint.save(folder, {"discriminator": engine}, {}, models={})
    return checkpoint_ranks.step(engine, 1)


def load_experts(world: World, folder: Path) -> tuple[float, float]:
    engine = checkpoint_ranks.build(world, "discriminator")
    checkpoint.load(folder, {"discriminator": engine})
    return checkpoint_ranks.step(engine, 1)


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "replicated"])
def test_experts_change_their_layout_too(gloo: GlooWorld, tmp_path: Path, distributed: bool) -> None:
    """Claim: experts and their moments saved at TP2-EP2 go on at EP2 and on one rank (5e-6 relative)."""
    folder = tmp_path / "step_000001"
    saving = ParallelConfig(tp=2, ep=2, distributed_optimizer=distributed)
    expected = gloo.run(save_experts, folder, parallel=saving)[0]
    for ranks, ep in ((2, 2), (1, 1)):
        loading = ParallelConfig(ep=ep, distributed_optimizer=distributed)
        found = gloo.run(load_experts, folder, num_ranks=ranks, parallel=loading)[0]
        assert found == pytest.approx(expected, rel=5e-6)
