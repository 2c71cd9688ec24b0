"""A model folder of random weights, of any size, written a few megabytes at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model_providers.qwen3_vl.mapping import weight_mappings
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.fields import check_fields
from prism_megatron.config.presets import PRESETS, hf_config, preset
from prism_megatron.config.tools.convert import MakeRandomConfig
from prism_megatron.conversion.hf.shards import Spec, lay_out
from prism_megatron.conversion.hf.stored_tensor import DTYPES, bytes_of
from prism_megatron.conversion.hf.writer import stated
from prism_megatron.conversion.resumable import check_space, flush
from prism_megatron.errors import ConfigError
from prism_megatron.observability.transfer import TransferProgress

_PIECE_BYTES = 16 * 2**20
_SCALE = 0.05


def make_random(config: MakeRandomConfig) -> None:
    """Write ``config.save``: ``config.json`` and safetensors.

    Raises ConfigError for a folder that is there already, and for a size below 1.
    """
    if config.config is None or config.save is None:
        raise ConfigError("name a config.json or a published size with --config, and the folder to write with --save")
    check_fields(config)
    save = Path(config.save)
    if save.exists():
        raise ConfigError(f"--save {save} exists; name another place")
    document = hf_config(preset(config.config)) if config.config in PRESETS else _read(Path(config.config))
    document = stated(document, DTYPES[config.dtype])
    shape = Qwen3VLShape.from_dict(document, where=config.config)
    specs = {
        name: Spec(hf_shape, DTYPES[config.dtype])
        for mapping in weight_mappings(shape, config.expert_layout)
        for name, hf_shape in zip(mapping.hf_names, mapping.hf_shapes or (), strict=True)
    }
    files = lay_out(specs, config.shard_mb * 10**6)
    aside = save.with_name(f".{save.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        check_space(aside, sum(shard.num_bytes for shard in files.shards))
        progress = TransferProgress("random weights", total_bytes=sum(spec.num_bytes for spec in specs.values()))
        for shard in files.shards:
            with (aside / shard.name).open("wb") as file:
                file.write(shard.head)
                for name in shard.begins:
                    for piece in _pieces(name, specs[name], config.seed):
                        file.write(bytes_of(piece))
                        progress.add(piece.nbytes)
                file.flush()
                os.fsync(file.fileno())
        progress.finish()
        files.write_index(aside)
        (aside / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        aside.rename(save)
        flush(save.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _pieces(name: str, spec: Spec, seed: int) -> Iterator[Tensor]:
    """The tensor's values in order, uniform and drawn from (seed, name) alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    left = spec.num_bytes // spec.dtype.itemsize
    while left:
        count = min(left, _PIECE_BYTES // 4)
        yield torch.empty(count).uniform_(-_SCALE, _SCALE, generator=generator).to(spec.dtype)
        left -= count


def _read(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--config {path} is no readable config.json ({error}), and none of {', '.join(PRESETS)}"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path} holds {type(document).__name__}, expected a JSON object")
    return document
