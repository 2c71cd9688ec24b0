"""``prism-convert inspect MODEL``: what a model folder or a checkpoint holds, from its headers and index alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from model_providers.moe_discriminator.folder import is_discriminator, read_variant
from model_providers.moe_discriminator.mapping import count_parameters
from model_providers.moe_discriminator.variant import Variant
from model_providers.qwen3_vl.mapping import EMBEDDING, LM_HEAD
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.check import InspectConfig
from prism_megatron.conversion.checkpoints.folder import companions_folder, is_checkpoint
from prism_megatron.conversion.checkpoints.model_names import FORMS, folder_of
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.expert_layout import detect_expert_layout
from prism_megatron.conversion.hf.block_fp8 import CONFIG_KEY
from prism_megatron.conversion.hf.files import member, read_object
from prism_megatron.conversion.hf.quantised import QUANT_CONFIG
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.data.reading.model_files import check_model_files
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.jobs.model_folder import open_model_folder

Facts = dict[str, Any]

_QUANTISATION = ("quant_method", "quant_algo", "fmt", "weight_block_size")


def inspect_folder(config: InspectConfig) -> Facts:
    """What ``config.folder`` holds, as JSON has it. Raises PrismError for one that is damaged or incomplete."""
    if not config.folder:
        raise ConfigError(f"inspect needs a model: {FORMS}")
    folder = folder_of(config.folder, flag="inspect", fetch=True)
    if is_checkpoint(folder):
        return _checkpoint_facts(TorchDistFolder(folder), list_tensors=config.tensors)
    return _model_facts(folder, list_tensors=config.tensors)


def text(facts: Facts) -> str:
    """One fact to a line, nested ones indented."""
    return "\n".join(_lines(facts, ""))


def _checkpoint_facts(folder: TorchDistFolder, *, list_tensors: bool) -> Facts:
    document, keys = folder.document, folder.keys()
    trained = any(key.startswith("optimizer.") for key in keys)
    facts: Facts = {
        "folder": str(folder.folder),
        "kind": "checkpoint of training" if trained else "checkpoint without optimizer, as conversion writes it",
        "format": document["format"],
        "written by": {"megatron-core": document["megatron_core"], "torch": document["torch"]},
        "state": document["state"],
        "files": _file_facts(folder.files()),
        "chunks": f"{sum(map(folder.num_chunks, keys))} for {len(keys)} tensors, "
        f"at most {max(map(folder.num_chunks, keys), default=0)} for one",
    }
    for role in sorted(document["engines"]):
        facts[role] = _role_facts(folder, role)
    if list_tensors:
        facts["tensors"] = {
            key: _format(folder.shape(key), folder.dtype(key)) + f" in {folder.num_chunks(key)} chunks" for key in keys
        }
    return facts


def _role_facts(folder: TorchDistFolder, role: str) -> Facts:
    keys = folder.keys()
    weights = [key for key in keys if key.startswith(f"{role}.")]
    optimizer = [key for key in keys if key.startswith("optimizer.") and f".{role}." in key]
    progress = folder.document["engines"][role]
    shapes, dtypes = {key: folder.shape(key) for key in keys}, {key: folder.dtype(key) for key in keys}
    facts: Facts = {"weights": _tensor_facts(weights, shapes, dtypes)}
    if optimizer:
        facts["optimizer"] = _tensor_facts(optimizer, shapes, dtypes) | {
            "steps taken": progress["steps_taken"],
            "Adam's count": progress["adam_step"],
        }
    companions = companions_folder(folder.folder, role)
    if role in folder.document["models"]:
        kept = folder.document["models"][role]
        facts |= _config_facts(companions) | {
            "experts are stored in Hugging Face folders as": kept["expert_layout"] or "none: it is dense",
            "tied repeats in the source": kept["aliases"] or "none",
            "files": sorted(path.name for path in companions.iterdir()),
        }
        words = Qwen3VLShape.from_folder(companions).text.vocab
        rows = shapes.get(f"{role}.{EMBEDDING}", (0,))[0]
        facts["vocabulary"] = f"{words} words in {rows} rows ({rows - words} of padding)"
    return facts


def _model_facts(path: Path, *, list_tensors: bool) -> Facts:
    """Raises PrismError for what is no model. Weights that ModelOpt quantised are shown as they are stored."""
    folder = HFFolder(path)
    if not (path / QUANT_CONFIG).exists():
        open_model_folder(path)
    names, shapes, dtypes = folder.names(), folder.shapes(), folder.dtypes()
    facts: Facts = {
        "folder": str(folder.folder),
        "kind": "discriminator folder" if is_discriminator(folder.folder) else "Hugging Face model folder",
        "files": _file_facts(sorted(folder.folder.glob("*.safetensors"))),
        "weights": _tensor_facts(names, shapes, dtypes),
        **_config_facts(folder.folder),
    }
    shape = Qwen3VLShape.from_folder(path)
    facts["files beside the weights"] = _files_fact(path, shape)
    if shape.text.experts is not None:
        facts["experts are stored as"] = detect_expert_layout(folder, shape) or "none of the known layouts"
    if shape.text.tied:
        facts["tied repeat"] = LM_HEAD if LM_HEAD in names else "none"
    if list_tensors:
        facts["tensors"] = {name: _format(shapes[name], dtypes[name]) for name in names}
    return facts


def _files_fact(folder: Path, shape: Qwen3VLShape) -> str:
    try:
        check_model_files(folder, shape)
    except DataError as error:
        return f"cannot train: {error}"
    return "tokenizer, chat template and image settings"


def _config_facts(folder: Path) -> Facts:
    """What ``config.json`` says of the model."""
    shape = Qwen3VLShape.from_folder(folder)
    model = f"{shape.text.num_layers} layers, hidden {shape.text.hidden}, vision depth {shape.vision.depth}"
    facts: Facts = {"model": model, "vocabulary": f"{shape.text.vocab} words",
                    "embedding and output layer": "tied" if shape.text.tied else "apart"}  # fmt: skip
    quantised = read_object(member(folder, "config.json")).get(CONFIG_KEY)
    if isinstance(quantised, dict):
        facts["quantised"] = " ".join(str(quantised[key]) for key in _QUANTISATION if key in quantised)
    if is_discriminator(folder):
        facts |= _discriminator_facts(shape, read_variant(folder))
    elif shape.text.experts is not None:
        experts = shape.text.experts
        facts["experts"] = f"{experts.count} in a layer, {experts.width} wide, {experts.per_token} of them for a token"
    return facts


def _discriminator_facts(shape: Qwen3VLShape, variant: Variant) -> Facts:
    _, per_token = count_parameters(shape, variant.towers)
    facts: Facts = {"routing": variant.routing, "modality": variant.modality}
    if variant.towers is not None:
        towers = variant.towers
        facts["towers"] = (
            f"{towers.num_towers} of {towers.experts_per_tower} experts, {towers.top_k} of them for a token"
        )
    return facts | {"parameters without the experts that a token skips": per_token}


def _tensor_facts(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> Facts:
    sizes = {name: prod(shapes[name]) for name in names}
    formats = Counter(str(dtypes[name]).removeprefix("torch.") for name in names)
    return {
        "tensors": len(names),
        "parameters": sum(sizes.values()),
        "bytes": sum(size * dtypes[name].itemsize for name, size in sizes.items()),
        "formats": ", ".join(f"{kind} ({count})" for kind, count in sorted(formats.items())),
    }


def _file_facts(files: Sequence[Path]) -> str:
    return f"{len(files)} with {sum(path.stat().st_size for path in files)} bytes"


def _format(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _lines(facts: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}", *_lines(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {value if isinstance(value, str) else json.dumps(value)}")
    return lines
