"""States of Energon's loader tell their ranks and workers, run nothing, and are refused at any other layout."""

from __future__ import annotations

import os
import random
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_megatron.data.formats.energon_state import EnergonState, energon_state, refuse_other_layout
from prism_megatron.errors import DataError
from tests.conftest import SEED


class FlexState(dict[str, Any]):
    """Energon's own states are dictionaries of this name."""


class SavableDataLoaderState:
    """Fields as in Energon 7.4; states that it saved itself were read by hand."""

    def __init__(self, workers: int) -> None:
        self.worker_states = [FlexState(rng=random.getstate(), at=torch.zeros(2)) for _ in range(workers)]
        self.next_worker_id = 0
        self.micro_batch_size = None


class Trap:
    """Makes a folder when a pickle that holds it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that are nowhere when they are read."""
    module = types.ModuleType("gone")
    for kind in (SavableDataLoaderState, FlexState):
        monkeypatch.setattr(kind, "__module__", "gone")
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "gone", module)


def saved(folder: Path, *workers: int) -> Path:
    folder.mkdir()
    for rank, count in enumerate(workers):
        torch.save(SavableDataLoaderState(count), folder / f"state_rank{rank}.pt")
    return folder


def test_a_state_is_good_for_its_own_layout_only(tmp_path: Path) -> None:
    folder = saved(tmp_path / "states", 3, 3)
    del sys.modules["gone"]
    assert refuse_other_layout(folder, ranks=2, workers=3) == EnergonState(2, 3)
    for ranks, workers in ((1, 6), (3, 2), (2, 1), (1, 3), (4, 3)):
        with pytest.raises(DataError, match=r"state of Energon's loader at 2 ranks with 3 workers each, not at"):
            refuse_other_layout(folder, ranks=ranks, workers=workers)


def test_files_of_all_ranks_and_of_megatron_are_understood(tmp_path: Path) -> None:
    torch.save([SavableDataLoaderState(2) for _ in range(4)], tmp_path / "all.pt")
    torch.save({"dataloader_state_dict": SavableDataLoaderState(1)}, tmp_path / "one.pt")
    assert energon_state(tmp_path / "all.pt") == EnergonState(4, 2)
    assert energon_state(tmp_path / "one.pt") == EnergonState(1, 1)
    with pytest.raises(DataError, match=r"ranks have \[1, 3\] workers; they must have equally many"):
        energon_state(saved(tmp_path / "uneven", 3, 1))


def test_nothing_in_a_state_is_run(tmp_path: Path) -> None:
    state = SavableDataLoaderState(1)
    state.worker_states.append(FlexState(trap=Trap(tmp_path / "sprung")))
    torch.save(state, tmp_path / "a.pt")
    assert energon_state(tmp_path / "a.pt") == EnergonState(1, 2)
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "sprung").exists(), "blind: the trap does not work"


def test_anything_else_is_one_error(tmp_path: Path) -> None:
    good = (saved(tmp_path / "states", 2) / "state_rank0.pt").read_bytes()
    path = tmp_path / "x.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    for number in range(300):
        draw = random.Random(f"{SEED} {number}")
        if number:
            data = bytearray(good if number % 2 else _repacked(good, draw, path))
            for _ in range(draw.choice((1, 3))):
                data[draw.randrange(len(data))] = draw.randrange(256)
            path.write_bytes(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
        try:
            outcome = str(energon_state(path))
        except DataError as error:
            outcome = str(error)
        assert outcome.startswith(("EnergonState(ranks=1, workers=", str(path)))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"holds no \.pt file"):
        energon_state(empty)


def _repacked(good: bytes, draw: random.Random, path: Path) -> bytes:
    """The same archive with its pickle damaged, and sums of it that are right again."""
    path.write_bytes(good)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    data = bytearray(parts[name])
    data[draw.randrange(len(data))] = draw.randrange(256)
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in (parts | {name: bytes(data)}).items():
            archive.writestr(part, content)
    return path.read_bytes()
