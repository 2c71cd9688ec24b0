"""Folders round-trip exactly, and appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_megatron.conversion.hf.reader import INDEX, HFFolder
from prism_megatron.conversion.hf.writer import COMPANIONS, stating, write_hf_folder
from prism_megatron.errors import ConversionError
from tests.unit.conversion.disk import record_calls
from tests.unit.conversion.folders import companions, sharded, weights


@pytest.fixture
def like(tmp_path: Path) -> Path:
    return companions(tmp_path / "like")


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


def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: all files and the folder are flushed before the last rename, and the rename after it."""
    calls = record_calls(monkeypatch)
    write_hf_folder(tmp_path / "model", weights().items(), like=like, max_shard_bytes=70)
    *before, rename, after = calls
    (aside,) = (call.split()[1] for call in calls if call.endswith(f" to {tmp_path / 'model'}"))
    flushed = {call for call in before if call.startswith("flush")}
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert flushed == {f"flush {aside}", *(f"flush {aside}/{name}" for name in names)}
    assert rename == f"rename {aside} to {tmp_path / 'model'}"
    assert after == f"flush {tmp_path}"


def test_overlapping_views_are_written_each_for_itself(tmp_path: Path, like: Path) -> None:
    numbers = torch.arange(8.0)
    views = {"x": numbers[:5], "y": numbers[3:], "z": numbers}
    write_hf_folder(tmp_path / "model", views.items(), like=like)
    assert all(torch.equal(HFFolder(tmp_path / "model").get(name), view) for name, view in views.items())


def test_shards_are_no_larger_than_asked_for(tmp_path: Path, like: Path) -> None:
    """Claim: a tensor goes into the next shard where it would make this one larger; the index counts all bytes."""
    sizes = {"a": 6, "b": 4, "c": 5, "d": 9, "e": 1}
    tensors = [(name, torch.zeros(size, dtype=torch.uint8)) for name, size in sizes.items()]
    write_hf_folder(tmp_path / "model", tensors, like=like, max_shard_bytes=10)
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    files = [index["weight_map"][name] for name in sizes]
    assert [sorted(set(files)).index(file) for file in files] == [0, 0, 1, 2, 2]
    assert index["metadata"]["total_size"] == 25


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


def test_an_exported_config_is_not_that_of_quantised_weights(tmp_path: Path, like: Path) -> None:
    (like / "config.json").write_text('{"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}')
    write_hf_folder(tmp_path / "m", weights().items(), like=like)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "float16"}),
        (
            {"text_config": {"dtype": "bfloat16", "x": 1}},
            {"text_config": {"dtype": "float16", "x": 1}, "dtype": "float16"},
        ),
        ({"torch_dtype": "float32", "vision_config": {}}, {"torch_dtype": "float16", "vision_config": {}}),
    ],
)
def test_a_config_says_the_format_of_the_weights_wherever_it_names_one(
    tmp_path: Path, like: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Claim: after a cast no section names the old format; a config that is right already keeps its bytes."""
    (like / "config.json").write_text(json.dumps(config))
    for folder in (like, tmp_path / "m"):
        write_hf_folder(tmp_path / "m", weights().items(), like=folder, dtype=torch.float16)
        assert json.loads((tmp_path / "m" / "config.json").read_text()) == expected
    text = (tmp_path / "m" / "config.json").read_bytes()
    assert stating(text.replace(b" ", b""), torch.float16) == text.replace(b" ", b"")


def test_every_file_that_transformers_saves_beside_the_weights_is_a_companion() -> None:
    """Oracle: transformers' own file names; transformers 5 saves a processor, that of images included, in one file."""
    from transformers import utils

    names = ("CONFIG_NAME", "GENERATION_CONFIG_NAME", "PROCESSOR_NAME", "IMAGE_PROCESSOR_NAME", "VIDEO_PROCESSOR_NAME")
    assert {getattr(utils, name) for name in (*names, "CHAT_TEMPLATE_FILE")} <= set(COMPANIONS)


def test_an_unknown_name_is_refused(tmp_path: Path, like: Path) -> None:
    folder = HFFolder(sharded(tmp_path / "m", like))
    with pytest.raises(ConversionError, match="holds no tensor 'nope'"):
        folder.get("nope")
