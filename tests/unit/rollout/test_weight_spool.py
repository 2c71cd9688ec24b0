"""The newest weights as a model folder: whole, each weight once, linked where nothing changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.errors import WeightSyncError
from prism_megatron.rollout.weight_spool import Spool, join_parts, remove_leftovers, remove_older, spool_folder
from tests.unit.rollout.fake_sglang import FOLDER


def spooled(folder: Path, *files: Mapping[str, Tensor]) -> Path:
    spool = Spool(folder, like=FOLDER)
    for tensors in files:
        spool.add(list(tensors.items()))
    spool.finish()
    return folder


def held(folder: Path) -> dict[str, list[float]]:
    """By the index, and by reading every file as a server does: each weight must stand in one of them."""
    in_files = [item for path in sorted(folder.glob("*.safetensors")) for item in load_file(path).items()]
    assert len({name for name, _ in in_files}) == len(in_files), "a weight stands in two files"
    source = HFFolder(folder)
    assert sorted(source.names()) == sorted(name for name, _ in in_files)
    assert all(torch.equal(source.get(name), tensor) for name, tensor in in_files)
    return {name: tensor.flatten().tolist() for name, tensor in in_files}


def test_tensors_are_written_in_the_order_of_their_indices(tmp_path: Path) -> None:
    """A transposed one, whose memory has another order, and a bfloat16 one."""
    transposed = torch.arange(6.0).reshape(2, 3).T
    folder = spooled(tmp_path / "a", {"t": transposed, "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)})
    assert held(folder) == {"t": [0.0, 3.0, 1.0, 4.0, 2.0, 5.0], "b": [1.5, -2.0]}
    assert HFFolder(folder).get("t").shape == (3, 2)
    assert json.loads((folder / "config.json").read_text()) == json.loads((FOLDER / "config.json").read_text())


def test_what_is_left_out_is_taken_from_the_folder_before(tmp_path: Path) -> None:
    """A file of which a part is kept, one of which all is, and one of which nothing is."""
    one, two, three = torch.ones(2), torch.full((3,), 2.0), torch.full((1,), 3.0)
    before = spooled(tmp_path / "a", {"z": two, "changed": two}, {"x": one, "y": one}, {"changed too": three})
    spool = Spool(tmp_path / "b", like=FOLDER)
    spool.carry_over(before, {"x", "y", "z"})
    spool.add([("changed", -two), ("changed too", -three)])
    spool.finish()
    expected = {"x": [1.0] * 2, "y": [1.0] * 2, "z": [2.0] * 3, "changed": [-2.0] * 3, "changed too": [-3.0]}
    assert held(spool.folder) == expected
    spool.remove()
    assert held(before)["x"] == [1.0] * 2, "what is linked must outlive the link"
    assert not spool.folder.exists()


def test_a_disk_that_takes_nothing_is_an_error_of_the_update(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(WeightSyncError, match="cannot be written to"):
        Spool(tmp_path / "taken", like=FOLDER)


def test_only_spools_are_leftovers(tmp_path: Path) -> None:
    spooled(spool_folder(tmp_path, 3), {"x": torch.ones(1)})
    (tmp_path / "model").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_parts_take_over_their_own_files_alone(tmp_path: Path) -> None:
    """Claim: two processes fill one folder; it is whole when both say so, also where each keeps what did not change."""
    before, after = tmp_path / "weights-0", tmp_path / "weights-1"
    for part in (0, 1):
        spool = Spool(before, like=FOLDER, part=part)
        spool.add([(f"frozen {part}", torch.full((2,), float(part))), (f"changed {part}", torch.zeros(1))])
        assert not join_parts(before, [0, 1], like=FOLDER)
        spool.finish()
    assert join_parts(before, [0, 1], like=FOLDER)
    for part in (0, 1):
        spool = Spool(after, like=FOLDER, part=part)
        spool.carry_over(before, {"frozen 0", "frozen 1"})
        spool.add([(f"changed {part}", torch.ones(1))])
        spool.finish()
    assert join_parts(after, [0, 1], like=FOLDER)
    assert held(after) == {"frozen 0": [0.0] * 2, "frozen 1": [1.0] * 2, "changed 0": [1.0], "changed 1": [1.0]}
    (tmp_path / "weights-2").mkdir()
    remove_older(after)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights-1", "weights-2"]
