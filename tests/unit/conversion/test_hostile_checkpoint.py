"""Damaged and hostile checkpoints: one clear error each, whoever reads them, and nothing of theirs is run.

``--load`` of a run makes ``read_checkpoint`` before Megatron sees the folder; ``tests/distributed/test_checkpoint.py``
holds it to that, and to hostile data files. Blind spot: a folder that changes while it is read.
"""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from prism_megatron.config.check import CheckConfig, InspectConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig
from prism_megatron.conversion.checkpoints import folder as checkpoint_folder
from prism_megatron.conversion.checkpoints.folder import read_checkpoint
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.errors import CheckpointError
from prism_megatron.jobs.check_weights import check_weights
from prism_megatron.jobs.convert import to_hf, to_megatron
from prism_megatron.jobs.inspect_folder import inspect_folder

POLICY = str(MINI_FOLDER / "policy")
KEY = "policy.decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini's policy as a checkpoint."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    to_megatron(ToMegatronConfig(hf=POLICY, save=str(folder)), say=lambda _: None)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def test_known_layouts_are_those_of_the_mappings() -> None:
    """Claim: the check of ``state.json``, which stays free of torch, knows every layout and no other."""
    assert set(checkpoint_folder._EXPERT_LAYOUTS) == {None, *get_args(ExpertLayout)}


def convert(folder: Path) -> None:
    to_hf(ToHFConfig(load=str(folder), save=str(folder.parent / "hf")), say=lambda _: None)


READERS: tuple[Callable[[Path], Any], ...] = (
    read_checkpoint,
    lambda folder: inspect_folder(InspectConfig(str(folder))),
    lambda folder: check_weights(CheckConfig(str(folder), POLICY)),
    lambda folder: check_weights(CheckConfig(str(folder), str(folder))),
    convert,
)


def assert_refused(folder: Path, expected: str, readers: tuple[Callable[[Path], Any], ...] = READERS) -> None:
    for read in readers:
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        message = str(caught.value)
        assert expected in message and str(folder) in message and len(message.splitlines()) == 1, message
        assert len(message.replace(str(folder), "")) < 500
    assert not (folder.parent / "hf").exists()
    assert not (folder.parent / "ran").exists()


class Payload:
    """A pickle that would make the file ``ran`` beside the folder when it is read."""

    def __init__(self, folder: Path, call: Callable[[str], Any] = os.system) -> None:
        marker = folder.parent / "ran"
        self._call = call
        self._argument = f"touch {marker}" if call is os.system else f"open({str(marker)!r}, 'w')"

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call, (self._argument,)


def change_index(folder: Path, change: Callable[[Metadata], None]) -> None:
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))


def change_place(folder: Path, **fields: Any) -> None:
    """Change where the index says that one tensor lies."""

    def change(index: Metadata) -> None:
        (where,) = (where for where in index.storage_data if where.fqn == KEY)
        index.storage_data[where] = dataclasses.replace(index.storage_data[where], **fields)

    change_index(folder, change)


def test_the_whole_checkpoint_is_read_by_all(folder: Path) -> None:
    """Claim: what the tests below break was whole."""
    for read in READERS:
        read(folder)


def test_payloads_of_these_tests_do_run(folder: Path) -> None:
    """Claim: plain pickle would have run them, so that "nothing ran" says something."""
    for call in (os.system, builtins.exec):
        pickle.loads(pickle.dumps(Payload(folder, call)))
        (folder.parent / "ran").unlink()


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/hostname"])
def test_sizes_of_files_elsewhere_are_not_looked_up(folder: Path, name: str) -> None:
    """Claim: ``state.json`` says how long the checkpoint's own files are, and of no other whether it is there."""
    with pytest.raises(CheckpointError, match=f"names '{name}', which is outside"):
        checkpoint_folder.check_sizes(folder, {"sizes": {name: 1}})


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [os.system, builtins.exec], ids=["system", "exec"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside an index"])
def test_code_in_the_index_is_named(folder: Path, call: Callable[[str], Any], protocol: int, inside: bool) -> None:
    payload: Any = Payload(folder, call)
    if inside:
        index = pickle.loads((folder / ".metadata").read_bytes())
        index.planner_data = payload
        payload = index
    (folder / ".metadata").write_bytes(pickle.dumps(payload, protocol=protocol))
    assert_refused(
        folder, f".metadata would run '{call.__module__}.{call.__name__}'" if protocol == 4 else "would run '"
    )


def test_a_pickled_object_among_the_tensors_is_refused(folder: Path) -> None:
    """Claim: torch would unpickle such an entry without limits; the index may not even name it."""
    change_index(folder, lambda index: index.state_dict_metadata.update({KEY: BytesStorageMetadata()}))
    assert_refused(folder, "BytesStorageMetadata")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is damaged"),
        (b"\x80\x04]" + b"]a" * 50_000 + b".", "holds no index of tensors but list"),
        (b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".", "holds no index of tensors but list"),
        (b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1) + b".", "memo entry 2147483647"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".", "is damaged"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", "is damaged"),
    ],
    ids=["empty", "long", "deep", "huge memo", "huge bytes", "huge frame"],
)
def test_an_index_of_absurd_sizes_is_refused(folder: Path, content: bytes, expected: str) -> None:
    """Claim: refused without taking the memory it asks for (a memo of 2^31 entries would be 32 GB)."""
    (folder / ".metadata").write_bytes(content)
    assert_refused(folder, expected)


@pytest.mark.parametrize("name", ["../stolen.distcp", "/etc/passwd", "sub/x.distcp", ".metadata", "..", ""])
def test_a_data_file_elsewhere_is_refused(folder: Path, name: str) -> None:
    shutil.copy(folder / "__0_0.distcp", folder.parent / "stolen.distcp")
    change_place(folder, relative_path=name)
    assert_refused(folder, f"names {name!r}, which is not a data file of this folder")


@pytest.mark.parametrize("name", ["__0_0.distcp", "hf/policy/config.json", "state.json", "common.pt", "hf/policy"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    """Claim: even to a file with the same content: what is not in the folder is not the checkpoint's to give."""
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert_refused(folder, f"{name} links to {outside}")


def test_chunks_are_held_to_their_files(folder: Path, whole: Path) -> None:
    """Claim: a place past the end, a coded one, a missing file and a shortened file are named."""
    change_place(folder, length=10**12)
    assert_refused(folder, f"places {KEY!r} at bytes")
    change_place(folder, length=-1)
    assert_refused(folder, "places")
    change_place(folder, length=64)
    assert_refused(folder, "keeps 64 bytes for a chunk")
    num_bytes = TorchDistFolder(whole).shape(KEY)[0] * TorchDistFolder(whole).dtype(KEY).itemsize
    change_place(folder, length=num_bytes - 1)
    assert_refused(folder, f"keeps {num_bytes - 1} bytes for a chunk")
    change_place(folder, transform_descriptors=["zstd"])
    assert_refused(folder, "['zstd']")
    change_place(folder, relative_path="__9_9.distcp")
    assert_refused(folder, "names '__9_9.distcp', which is missing")


def test_a_shortened_data_file_is_named(folder: Path) -> None:
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)
    assert_refused(folder, "was it cut short?")


def test_shapes_are_held_to_their_chunks(folder: Path) -> None:
    """Claim: a hole, a huge shape and a chunk outside of its tensor are refused before memory is taken for them."""

    def of(index: Metadata) -> TensorStorageMetadata:
        tensor = index.state_dict_metadata[KEY]
        assert isinstance(tensor, TensorStorageMetadata)
        return tensor

    def enlarge(index: Metadata) -> None:
        of(index).size = torch.Size([2**50])

    def drop(index: Metadata) -> None:
        of(index).chunks.clear()

    def shift(index: Metadata) -> None:
        of(index).chunks[0].offsets = torch.Size([2**50])

    for change, expected in ((enlarge, "do not cover"), (drop, "do not cover"), (shift, "gives a chunk")):
        before = (folder / ".metadata").read_bytes()
        change_index(folder, change)
        assert_refused(folder, expected)
        (folder / ".metadata").write_bytes(before)


def test_code_in_common_pt_is_never_run(folder: Path) -> None:
    """Claim: as torch.save writes it, as a bare pickle, and behind a zip bomb."""
    torch.save({"x": Payload(folder)}, folder / "common.pt")
    assert_refused(folder, f"would run '{os.system.__module__}.system'")
    (folder / "common.pt").write_bytes(pickle.dumps(Payload(folder)))
    assert_refused(folder, "is not a file that torch.save writes")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("common/data.pkl", b"\0" * 2**25)
    (folder / "common.pt").write_bytes(bomb.getvalue())
    assert_refused(folder, "is not a file that torch.save writes")


def test_metadata_json_of_either_megatron_is_read(folder: Path) -> None:
    """Claim: 0.16.1 names the reader of common objects there, 0.19.2 does not."""
    for named in ({"common_backend": "torch", "common_backend_version": 1}, {}):
        written = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, **named}
        (folder / "metadata.json").write_text(json.dumps(written))
        read_checkpoint(folder)


def test_metadata_json_names_no_other_reader(folder: Path) -> None:
    """Claim: Megatron imports the reader that stands there, so only ours may."""
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "common_backend": "torch"}))
    assert_refused(folder, "names {'sharded_backend': 'zarr'")
    (folder / "metadata.json").write_text("{}")
    assert_refused(folder, "metadata.json is damaged")
    (folder / "metadata.json").write_text("[1]")
    assert_refused(folder, "metadata.json is damaged")
    (folder / "metadata.json").write_text("[" * 100_000)
    assert_refused(folder, "metadata.json is damaged")


GOOD: dict[str, Any] = {"format": 2, "megatron_core": "", "torch": "", "engines": {}, "models": {}, "state": {}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is damaged"),
        ("\udcff", "is damaged"),
        (json.dumps({**GOOD, "format": 1}), "has checkpoint format 1; this version reads 2"),
        (json.dumps({**GOOD, "engines": []}), "is damaged"),
        (json.dumps({**GOOD, "engines": {"../..": {"steps_taken": 0, "adam_step": 0}}}), "there is no role '../..'"),
        (json.dumps({**GOOD, "engines": {"policy": {"steps_taken": True, "adam_step": 0}}}), "is damaged"),
        (json.dumps({**GOOD, "models": {"policy": {"expert_layout": None, "aliases": []}}}), "the model of 'policy'"),
        (
            json.dumps(
                {
                    **GOOD,
                    "engines": {"policy": {"steps_taken": 0, "adam_step": 0}},
                    "models": {"policy": {"expert_layout": "other", "aliases": []}},
                }
            ),
            "the model of 'policy' is {'expert_layout': 'other'",
        ),
    ],
    ids=["empty", "deep", "list", "no text", "older", "engines", "role", "count", "model", "layout"],
)
def test_a_damaged_state_is_named(folder: Path, content: str, expected: str) -> None:
    (folder / "state.json").write_bytes(content.encode(errors="surrogateescape"))
    assert_refused(folder, expected)


def test_code_in_a_data_file_is_never_run(folder: Path) -> None:
    """Claim: an archive that holds an object in place of a tensor is refused where it is read."""
    archive = io.BytesIO()
    torch.save(Payload(folder), archive)
    padded = archive.getvalue()
    path = folder / "__0_0.distcp"
    offset = path.stat().st_size
    with path.open("ab") as file:
        file.write(padded)
    change_place(folder, offset=offset, length=len(padded))
    assert_refused(folder, f"{path} at byte {offset}", READERS[2:])
