"""Damaged and hostile folders are refused with one clear error, on opening, and nothing in them is executed.

Blind spot: a file that changes after it was opened.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.conversion.hf.reader import INDEX, SINGLE, HFFolder
from prism_megatron.conversion.hf.writer import read_companions
from prism_megatron.errors import ConversionError
from tests.unit.conversion.folders import companions, sharded, weights


@pytest.fixture
def like(tmp_path: Path) -> Path:
    return companions(tmp_path / "like")


def edit_index(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def test_damaged_and_hostile_folders_are_refused(tmp_path: Path, like: Path) -> None:
    """Claim: each kind of damage is found on opening and named."""

    def refused(case: str, match: str) -> None:
        with pytest.raises(ConversionError, match=match):
            HFFolder(tmp_path / case)

    folder = sharded(tmp_path / "missing", like)
    first_shard(folder).unlink()
    refused("missing", "names model-00001.*which is missing")

    folder = sharded(tmp_path / "truncated", like)
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-5])
    refused("truncated", "no complete safetensors file")

    for number, file in enumerate(["../secret.safetensors", "/etc/x.safetensors", "a\\..\\b.bin", ".."]):
        edit_index(sharded(tmp_path / f"escape{number}", like), "a.weight", file)
        refused(f"escape{number}", "not a safetensors file of this folder")

    folder = sharded(tmp_path / "wrong-shard", like)
    edit_index(folder, "a.weight", max(folder.glob("model-*.safetensors")).name)
    refused("wrong-shard", "puts 'a.weight' into .*which does not hold it")

    folder = sharded(tmp_path / "beside-others", like)
    edit_index(folder, "c.bias", first_shard(folder).name)
    refused("beside-others", "puts 'c.bias' into .*which does not hold it")

    folder = sharded(tmp_path / "unlisted", like)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["b.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    refused("unlisted", "b.weight|names")

    folder = sharded(tmp_path / "twice", like)
    text = (folder / INDEX).read_text().replace('"c.bias"', '"a.weight"')
    (folder / INDEX).write_text(text)
    refused("twice", "'a.weight' stands twice")

    folder = sharded(tmp_path / "both-shards", like)
    save_file({"a.weight": torch.ones(1), "x": torch.ones(1)}, folder / "extra.safetensors")
    edit_index(folder, "x", "extra.safetensors")
    refused("both-shards", "is in both")

    folder = sharded(tmp_path / "no-map", like)
    (folder / INDEX).write_text('{"weight_map": []}')
    refused("no-map", "has no weight_map")
    (folder / INDEX).write_text("{")
    refused("no-map", "cannot be read as JSON")

    folder = sharded(tmp_path / "two-forms", like)
    (folder / SINGLE).write_bytes(b"")
    refused("two-forms", "holds both")


def header_and(data: bytes, header: str) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


HOSTILE_FILES = {
    "a pickle": (pickle.dumps({"a": 1}), "a pickle by another name"),
    "an archive of torch": (b"PK\x03\x04" + bytes(100), "a pickle by another name"),
    "empty": (b"", "no complete safetensors file"),
    "a header of 8 EiB": (struct.pack("<Q", 2**63 - 1) + b"{}", "no complete safetensors file"),
    "a tensor of 2 EiB": (
        header_and(
            bytes(8),
            '{"a": {"dtype": "F32", "shape": [536870912, 1073741824], "data_offsets": [0, 2305843009213693952]}}',
        ),
        "no complete safetensors file",
    ),
    "an overflow": (
        header_and(b"", '{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}'),
        "no complete safetensors file.*overflow",
    ),
    "offsets outside": (
        header_and(bytes(8), '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}'),
        "no complete safetensors file",
    ),
    "overlapping tensors": (
        header_and(bytes(8), '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
                             '"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        "no complete safetensors file",
    ),
    "one name twice": (
        header_and(bytes(8), '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
                             '"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}'),
        "'a' stands twice",
    ),
    "a size that is no number": (
        header_and(bytes(8), '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'),
        "no complete safetensors file",
    ),
    "a deep header": (header_and(b"", "[" * 100_000), "no complete safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    """Claim: whatever stands under the name of a safetensors file, opening it says what is wrong, or that it is no
    such file; the library refuses all but the repeated name, which it reads as the last of the two."""
    content, message = HOSTILE_FILES[case]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ConversionError, match=f"{SINGLE} .*{message}"):
        HFFolder(tmp_path)


HOSTILE_INDEXES = {
    "not finite": ('{"metadata": {"total_size": NaN}, "weight_map": {"a": "m.safetensors"}}', "NaN is no JSON"),
    "infinite": (
        '{"metadata": {"total_size": -Infinity}, "weight_map": {"a": "m.safetensors"}}',
        "-Infinity is no JSON",
    ),
    "deep": ("[" * 100_000, "cannot be read as JSON"),
    "5000 digits": ('{"metadata": ' + "1" * 5000 + "}", "cannot be read as JSON"),
    "a backslash": (r'{"weight_map": {"a": "..\\m.safetensors"}}', "not a safetensors file of this folder"),
    "a zero byte": (r'{"weight_map": {"a": "m\u0000.safetensors"}}', "not a safetensors file of this folder"),
    "a long name": ('{"weight_map": {"a": "' + "m" * 300 + '.safetensors"}}', "cannot be opened"),
    "a list": ("[]", "expected a JSON object"),
}


@pytest.mark.parametrize("case", HOSTILE_INDEXES)
def test_hostile_indexes_are_refused(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE_INDEXES[case]
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ConversionError, match=message):
        HFFolder(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path: Path, like: Path) -> None:
    """Claim: a shard, the one file, the index, the config or a companion that links out is refused with the place it
    leads to; links that stay inside, and a folder that is itself a link, are followed."""
    outside = tmp_path / "outside"
    save_file({"a": torch.ones(1)}, outside.with_suffix(".safetensors"))
    for name in (SINGLE, INDEX):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to(outside.with_suffix(".safetensors"))
        with pytest.raises(ConversionError, match=f"is a link to {outside}.safetensors, outside its folder"):
            HFFolder(folder)

    folder = sharded(tmp_path / "shard", like)
    shard = first_shard(folder)
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(ConversionError, match=r"is a link to .*outside its folder"):
        HFFolder(folder)
    (tmp_path / shard.name).rename(folder / "blob")
    shard.unlink()
    shard.symlink_to("blob")
    (tmp_path / "alias").symlink_to(folder)
    assert list(HFFolder(tmp_path / "alias").names()) == sorted(weights())

    for name, read in (("config.json", open_weights), ("tokenizer.json", read_companions)):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(ConversionError, match=f"{name} is a link to .*outside its folder"):
            read(folder)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


def test_links_of_the_hub_cache_stay_in_their_repository(tmp_path: Path, like: Path) -> None:
    """Claim: a snapshot's links to its repository's blobs are followed, those to another repository's are not."""
    hub = tmp_path / "hub"
    blobs = sharded(hub / "models--Qwen--A" / "blobs", like)
    for repository in ("models--Qwen--A", "models--Qwen--B"):
        snapshot = hub / repository / "snapshots" / "0123abc"
        snapshot.mkdir(parents=True)
        for blob in blobs.iterdir():
            (snapshot / blob.name).symlink_to(Path("../../../models--Qwen--A/blobs") / blob.name)
    assert list(open_weights(hub / "models--Qwen--A" / "snapshots" / "0123abc").names()) == sorted(weights())
    with pytest.raises(ConversionError, match=r"is a link to .*outside its folder"):
        HFFolder(hub / "models--Qwen--B" / "snapshots" / "0123abc")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Claim: a pipe, a folder and a loop of links are refused at once (opening a pipe would wait for a writer)."""
    made: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "loop": lambda path: path.symlink_to(path.name),
    }
    for name, make in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / INDEX).write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
        make(tmp_path / name / "m.safetensors")
        with pytest.raises(ConversionError, match=r"is no regular file|cannot be opened"):
            HFFolder(tmp_path / name)


@dataclass(frozen=True)
class Trace:
    """Unpickled, it makes a folder."""

    path: str

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    """Claim: a folder with only pickled weights is refused without unpickling, and so is a pickle renamed: the file
    would leave a trace if it were read."""
    code = pickle.dumps(Trace(str(tmp_path / "trace")))
    for name, message in (
        ("pytorch_model.bin", r"pickled weights.*safe_serialization"),
        (SINGLE, "a pickle by another name"),
    ):
        (tmp_path / name).write_bytes(code)
        with pytest.raises(ConversionError, match=message):
            HFFolder(tmp_path)
    assert not (tmp_path / "trace").exists()
    pickle.loads(code)
    assert (tmp_path / "trace").exists()


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is not a folder"):
        HFFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="holds neither"):
        HFFolder(tmp_path / "empty")
