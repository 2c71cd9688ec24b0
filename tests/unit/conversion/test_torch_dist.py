"""Tensors of a checkpoint folder: what torch writes we read, what we write torch reads, and damage is told."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from prism_megatron.conversion.checkpoints.folder import INDEX_FILE, write_state
from prism_megatron.conversion.checkpoints.pickles import read_index
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.checkpoints.torch_dist_writer import WrittenChunk, write_data_file, write_index
from prism_megatron.conversion.ops import Box
from prism_megatron.errors import CheckpointError
from tests.unit.conversion.disk import record_calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {"policy.bias": (7,), "policy.matrix": (9, 6), "policy.experts": (4, 6, 5)}
    return {key: torch.randn(shape).to(dtype) for (key, shape), dtype in zip(shapes.items(), DTYPES, strict=True)}


def halves(shape: tuple[int, ...]) -> list[Box]:
    """A tensor cut in two along every dimension, unevenly."""
    boxes = [Box((), ())]
    for length in shape:
        cuts = (0, length // 2 + 1, length)
        boxes = [Box((*box.offset, a), (*box.size, b - a)) for box in boxes for a, b in itertools.pairwise(cuts)]
    return boxes


def cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].clone()


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint of two data files, every tensor in 2 to 8 chunks that are spread over both."""
    folder.mkdir()
    placed = [(key, box, f"__0_{n % 2}.distcp") for key, t in tensors.items() for n, box in enumerate(halves(t.shape))]
    chunks = []
    for file in ("__0_0.distcp", "__0_1.distcp"):
        mine = [(key, box) for key, box, name in placed if name == file]
        lengths = write_data_file(folder / file, (cut(tensors[key], box) for key, box in mine), lambda _: None)
        for number, (key, box) in enumerate(mine):
            chunks.append(WrittenChunk(key, box, file, sum(lengths[:number]), lengths[number]))
    write_index(folder, {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}, chunks)
    add_state(folder)
    return folder


def add_state(folder: Path) -> None:
    write_state(
        folder,
        engines={"policy": {"steps_taken": 0, "adam_step": 0}},
        models={"policy": {"expert_layout": None, "aliases": []}},
        state={},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "step_000001", weights())


def test_what_torch_reads_is_what_was_written(folder: Path) -> None:
    """Claim: torch's own reader gets every bit of our chunks. Oracle: ``torch.distributed.checkpoint``."""
    found = {key: torch.zeros_like(tensor) for key, tensor in weights().items()}
    load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    for key, tensor in weights().items():
        assert torch.equal(found[key], tensor), key


def test_what_torch_writes_is_read(tmp_path: Path, folder: Path) -> None:
    """Claim: a folder that torch's own writer made, views of larger storages included, is read exactly."""
    theirs = tmp_path / "theirs"
    tensors = weights() | {"policy.view": torch.randn(6, 4)[2:5]}
    save(tensors, storage_writer=FileSystemWriter(theirs, single_file_per_rank=True), no_dist=True)
    for name in ("common.pt", "metadata.json"):
        (theirs / name).write_bytes((folder / name).read_bytes())
    add_state(theirs)
    opened = TorchDistFolder(theirs)
    for key, tensor in tensors.items():
        assert torch.equal(opened.read(key, 0, len(tensor)), tensor), key


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> TorchDistFolder:
    return TorchDistFolder(write(tmp_path_factory.mktemp("boxes") / "step_000001", weights()))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_box_is_read_exactly(opened: TorchDistFolder, data: st.DataObject) -> None:
    """Claim: a box of any tensor, over any number of chunks, is that part of it."""
    key = data.draw(st.sampled_from(sorted(weights())))
    tensor = weights()[key]
    spans = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in tensor.shape]
    box = Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
    assert torch.equal(opened.read_box(key, box), cut(tensor, box))
    assert (opened.shape(key), opened.dtype(key)) == (tuple(tensor.shape), tensor.dtype)


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    again = write(tmp_path / "again", weights())
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def edit_index(folder: Path, change: Callable[[object], None]) -> None:
    index = read_index(folder / INDEX_FILE)
    change(index)
    (folder / INDEX_FILE).write_bytes(pickle.dumps(index))


def test_damage_is_found_on_opening(folder: Path, tmp_path: Path) -> None:
    """Claim: a missing, short or foreign data file, and chunks that leave holes or overlap, are each told by name."""

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            TorchDistFolder(folder)

    file = folder / "__0_1.distcp"
    kept, index = file.read_bytes(), (folder / INDEX_FILE).read_bytes()
    file.write_bytes(kept[:-1])
    refused("'__0_1.distcp', which has .*cut short")
    file.unlink()
    refused(r"names '__0_1.distcp', which is missing")
    (tmp_path / "elsewhere").write_bytes(kept)
    file.symlink_to(tmp_path / "elsewhere")
    refused("outside the checkpoint")
    file.unlink()
    file.write_bytes(kept)

    def rename(index: object) -> None:
        for place in index.storage_data.values():  # type: ignore[attr-defined]
            place.relative_path = f"../{folder.name}/{place.relative_path}"

    edit_index(folder, rename)
    refused("which is not a data file of this folder")
    for twice in (True, False):

        def recut(index: object, twice: bool = twice) -> None:
            chunks = index.state_dict_metadata["policy.matrix"].chunks  # type: ignore[attr-defined]
            chunks[-1:] = [chunks[0], chunks[-1]] if twice else []

        (folder / INDEX_FILE).write_bytes(index)
        edit_index(folder, recut)
        refused("chunks that do not cover the shape .* of 'policy.matrix'")


def test_a_chunk_that_is_no_tensor_or_another_is_refused_when_read(folder: Path) -> None:
    """Claim: overwritten archives, and chunks exchanged in the index, never give wrong numbers."""
    file = folder / "__0_0.distcp"
    kept = file.read_bytes()
    file.write_bytes(b"\0" * len(kept))
    with pytest.raises(CheckpointError, match="no tensor that torch"):
        TorchDistFolder(folder).read("policy.matrix", 0, 9)
    file.write_bytes(kept)

    def exchange(index: object) -> None:
        places = index.storage_data  # type: ignore[attr-defined]
        first, second = (place for key, place in places.items() if key.fqn == "policy.bias")
        first.relative_path, second.relative_path = second.relative_path, first.relative_path
        first.offset, second.offset = second.offset, first.offset
        first.length, second.length = second.length, first.length

    edit_index(folder, exchange)
    with pytest.raises(CheckpointError, match=r"a tensor of \(\d,\).*but the index says \(\d,\)"):
        TorchDistFolder(folder).read("policy.bias", 0, 7)


def put_chunk(folder: Path, shape: tuple[int, ...], tensor: Tensor) -> str:
    """Make ``tensor`` the first chunk of this shape, in a data file of its own; returns the key."""
    index = read_index(folder / INDEX_FILE)
    boxes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, entry in index.state_dict_metadata.items()
        for chunk in entry.chunks  # type: ignore[union-attr]
    }
    where = next(w for w in index.storage_data if boxes[w.fqn, tuple(w.offset or ())] == shape)
    torch.save(tensor, folder / "__9_9.distcp")
    place = index.storage_data[where]
    place.relative_path, place.offset, place.length = "__9_9.distcp", 0, (folder / "__9_9.distcp").stat().st_size
    (folder / INDEX_FILE).write_bytes(pickle.dumps(index))
    assert set(where.offset or ()) == {0}
    return str(where.fqn)


def test_a_part_of_a_larger_storage_is_read_from_its_place(folder: Path) -> None:
    """Claim: torch.save keeps what a view is a part of; the chunk's numbers begin where the view does."""
    view = torch.arange(100.0)[10:14]
    key = put_chunk(folder, (4,), view)
    assert torch.equal(TorchDistFolder(folder).read(key, 0, 4), view)


def test_a_chunk_that_lies_otherwise_than_the_index_says_is_refused(folder: Path) -> None:
    """Claim: numbers of another format of the same width, and rows that do not lie one after another."""
    for tensor in (torch.arange(4, dtype=torch.int32), torch.arange(8.0)[::2], torch.arange(5.0)):
        key = put_chunk(folder, (4,), tensor)
        with pytest.raises(CheckpointError, match=r"but the index says \(4,\) in torch\.float32; do not use"):
            TorchDistFolder(folder).read(key, 0, 4)


def test_a_data_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch)
    write_data_file(tmp_path / "x.distcp", [torch.ones(3)], lambda _: None)
    part = tmp_path / "x.distcp.part"
    assert calls == [f"flush {part}", f"rename {part} to {tmp_path / 'x.distcp'}"]


def test_an_unknown_key_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tensor 'policy\.nope'"):
        TorchDistFolder(folder).read("policy.nope", 0, 1)
