"""Writes a Hugging Face model folder, shard by shard, so that it appears whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_megatron.config.architecture.rope import in_new_words
from prism_megatron.conversion.hf.block_fp8 import dequantised_config
from prism_megatron.conversion.hf.files import member, read_object
from prism_megatron.conversion.hf.reader import INDEX, SINGLE
from prism_megatron.data.reading.model_files import with_older_forms
from prism_megatron.disk import folder_beside, open_to_umask
from prism_megatron.errors import ConversionError

CONFIG = "config.json"
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Everything beside the weights that makes a folder loadable; what ``like`` has of it is copied."""


_SECTIONS = ("text_config", "vision_config")
DEFAULT_SHARD_BYTES = 4 * 2**30


def write_hf_folder(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: str | Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``tensors`` and the companion files of the model folder ``like`` to ``path``.

    The config then says ``dtype``, or what that of ``like`` says.

    Streaming: at most one shard of ``max_shard_bytes`` (or one larger tensor) is in memory. The folder is written
    beside ``path``, flushed to disk and renamed into place; an older model folder at ``path`` is replaced then.
    Raises ConversionError for a repeated name, no tensors, or a ``path`` that holds something else.
    """
    path, like = Path(path), Path(like)
    if path.exists() and not (path / CONFIG).is_file():
        raise ConversionError(f"{path} exists and is not a model folder; choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = folder_beside(path)
    try:
        _write_shards(aside, tensors, max_shard_bytes)
        for name, content in read_companions(like).items():
            (aside / name).write_bytes(stating(content, dtype) if dtype and name == CONFIG else content)
        for shard in aside.glob("*.safetensors"):
            open_to_umask(shard)
        for written in (*aside.iterdir(), aside):
            _flush(written)
        _put_in_place(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read_companions(folder: str | Path) -> dict[str, bytes]:
    """What a model folder has of the companion files, by name, with the older forms of those that are newer.

    The config is that of the model before it was quantised, and in the words that transformers 5 reads. Raises
    ConversionError for links that lead out of the folder (``hf_files.member``), DataError for JSON that cannot be read.
    """
    folder = Path(folder)
    found = {name: member(folder, name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}
    if CONFIG in found:
        held = read_object(member(folder, CONFIG))
        plain = in_new_words(dequantised_config(held))
        if plain != held:
            found[CONFIG] = (json.dumps(plain, indent=2) + "\n").encode()
    return with_older_forms(found, folder)


def stated(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``config`` saying that the weights are stored in ``dtype``, wherever it names a dtype, and at the top."""
    made = copy.deepcopy(dict(config))
    sections = [made, *(part for name in _SECTIONS if isinstance(part := made.get(name), dict))]
    named = [(section, key) for section in sections for key in ("dtype", "torch_dtype") if key in section]
    if not any(section is made for section, _ in named):
        named.append((made, "dtype"))
    for section, key in named:
        section[key] = str(dtype).removeprefix("torch.")
    return made


def stating(config: bytes, dtype: torch.dtype) -> bytes:
    """A ``config.json`` as ``stated``; the same bytes where it says so already."""
    document = json.loads(config)
    made = stated(document, dtype)
    return config if made == document else (json.dumps(made, indent=2) + "\n").encode()


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    shard_of: dict[str, int] = {}
    total, size, num_shards = 0, 0, 0
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in shard_of:
            raise ConversionError(f"tensor {name!r} was written twice")
        if shard and size + tensor.nbytes > max_shard_bytes:
            save_file(shard, _part(folder, num_shards), metadata={"format": "pt"})
            num_shards, shard, size = num_shards + 1, {}, 0
        shard[name] = _own_memory(tensor)
        shard_of[name] = num_shards
        size += tensor.nbytes
        total += tensor.nbytes
    if not shard:
        raise ConversionError(f"there are no tensors to write to {folder}")
    save_file(shard, _part(folder, num_shards), metadata={"format": "pt"})
    num_shards += 1
    if num_shards == 1:
        _part(folder, 0).rename(folder / SINGLE)
        return
    final = [f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" for number in range(num_shards)]
    for number, name in enumerate(final):
        _part(folder, number).rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: final[number] for name, number in sorted(shard_of.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _part(folder: Path, number: int) -> Path:
    """A shard's name until the number of shards is known."""
    return folder / f"part-{number:05d}.safetensors"


def _own_memory(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor that shares no storage: safetensors refuses shared ones, and a view keeps its base."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(aside: Path, path: Path) -> None:
    """Rename, moving an older folder out of the way first: a reader sees the old one, none for a moment, or the new."""
    old = path.with_name(f"{aside.name}.old")
    if path.exists():
        path.rename(old)
    aside.rename(path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)
