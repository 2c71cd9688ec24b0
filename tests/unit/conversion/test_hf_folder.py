"""Folders round-trip exactly; hostile and damaged ones are refused with one clear error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prism_megatron.conversion.hf_reader import INDEX, SINGLE, HFFolder
from prism_megatron.conversion.hf_writer import write_hf_folder
from prism_megatron.errors import ConversionError


@pytest.fixture
def like(tmp_path: Path) -> Path:
    folder = tmp_path / "like"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "notes.txt").write_text("not a companion")
    return folder


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "a.weight": torch.randn(5, 3),
        "b.weight": torch.randn(4, 4).to(torch.bfloat16),
        "c.bias": torch.randn(7),
        "d.weight": torch.randn(6, 2).t(),
    }


def sharded(folder: Path, like: Path) -> Path:
    write_hf_folder(folder, weights().items(), like=like, max_shard_bytes=70)
    return folder


@pytest.mark.parametrize("max_shard_bytes", [1, 70, 10**6])
def test_what_is_written_is_read_back_exactly(tmp_path: Path, like: Path, max_shard_bytes: int) -> None:
    """Claim: every tensor returns bit for bit at any shard size, views included; only companions come along."""
    target = tmp_path / "out" / "model"
    write_hf_folder(target, weights().items(), like=like, max_shard_bytes=max_shard_bytes)
    folder = HFFolder(target)
    assert list(folder.names()) == sorted(weights())
    for name, tensor in weights().items():
        assert torch.equal(folder.get(name), tensor)
        assert folder.get(name).dtype == tensor.dtype
        assert folder.shapes()[name] == tuple(tensor.shape)
    assert (target / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (target / "notes.txt").exists()
    assert (target / INDEX).exists() == (max_shard_bytes < 10**6)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_an_interrupted_write_leaves_the_old_folder(tmp_path: Path, like: Path) -> None:
    """Claim: a failure while streaming leaves what was there, and nothing beside it."""

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a.weight", torch.zeros(3)
        raise RuntimeError("the gather failed")

    target = tmp_path / "out" / "model"
    write_hf_folder(target, weights().items(), like=like)
    with pytest.raises(RuntimeError, match="gather failed"):
        write_hf_folder(target, broken(), like=like)
    assert list(HFFolder(target).names()) == sorted(weights())
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    write_hf_folder(target, [("z", torch.ones(2))], like=like)
    assert list(HFFolder(target).names()) == ["z"]


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path: Path, like: Path) -> None:
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("\\begin")
    with pytest.raises(ConversionError, match="not a model folder"):
        write_hf_folder(precious, weights().items(), like=like)
    assert (precious / "thesis.tex").exists()


def test_nothing_to_write_and_repeated_names_are_refused(tmp_path: Path, like: Path) -> None:
    with pytest.raises(ConversionError, match="no tensors"):
        write_hf_folder(tmp_path / "m", [], like=like)
    with pytest.raises(ConversionError, match="written twice"):
        write_hf_folder(tmp_path / "m", [("a", torch.ones(1))] * 2, like=like)


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

    folder = sharded(tmp_path / "unlisted", like)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["b.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    refused("unlisted", "b.weight|names")

    folder = sharded(tmp_path / "twice", like)
    text = (folder / INDEX).read_text().replace('"c.bias"', '"a.weight"')
    (folder / INDEX).write_text(text)
    refused("twice", "lists 'a.weight' twice")

    folder = sharded(tmp_path / "both-shards", like)
    save_file({"a.weight": torch.ones(1), "x": torch.ones(1)}, folder / "extra.safetensors")
    edit_index(folder, "x", "extra.safetensors")
    refused("both-shards", "is in both")

    folder = sharded(tmp_path / "no-map", like)
    (folder / INDEX).write_text("[]")
    refused("no-map", "has no weight_map")
    (folder / INDEX).write_text("{")
    refused("no-map", "cannot be read as JSON")

    folder = sharded(tmp_path / "two-forms", like)
    (folder / SINGLE).write_bytes(b"")
    refused("two-forms", "holds both")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    """Claim: a folder with only pickled weights is refused without unpickling (the file would raise if it were)."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ConversionError, match=r"pickled weights.*safe_serialization"):
        HFFolder(tmp_path)
    with pytest.raises(ConversionError, match="is not a folder"):
        HFFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="holds neither"):
        HFFolder(tmp_path / "empty")


def test_an_unknown_name_is_refused(tmp_path: Path, like: Path) -> None:
    folder = HFFolder(sharded(tmp_path / "m", like))
    with pytest.raises(ConversionError, match="holds no tensor 'nope'"):
        folder.get("nope")
