"""What a checkpoint folder is made of, and the checks that come before anything of it is used.

A folder ``step_000040/`` is a Megatron ``torch_dist`` checkpoint (tensors under names that do not depend on the layout)
with two things beside it: ``state.json``, and ``hf/{role}/`` with the files that make a role's weights a Hugging Face
model (config, tokenizer, chat template, preprocessor). It holds tensors and JSON only: Megatron's ``common.pt`` is
empty, and what is still pickled, the index of the tensors, is read by ``conversion/pickles.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from prism_megatron.conversion.pickles import check_objects, read_index
from prism_megatron.errors import CheckpointError

FORMAT = 2
STATE_FILE = "state.json"
INDEX_FILE = ".metadata"
OBJECTS_FILE = "common.pt"
BACKEND_FILE = "metadata.json"
COMPANIONS_FOLDER = "hf"

_PROGRESS_KEYS = {"steps_taken", "adam_step"}
_MODEL_KEYS = {"expert_layout", "aliases"}


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is a committed checkpoint, of training or converted."""
    return (folder / STATE_FILE).is_file()


def companions_folder(folder: Path, role: str) -> Path:
    """Where a checkpoint keeps the files that make ``role`` a Hugging Face model folder, weights aside."""
    return folder / COMPANIONS_FOLDER / role


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Metadata]:
    """``state.json`` and the index of tensors, after all checks that need no tensor.

    ``state.json`` is ``{"format", "megatron_core", "torch", "engines": {role: {"steps_taken", "adam_step"}}, "models":
    {role: {"expert_layout", "aliases"}}, "state"}``. Raises CheckpointError for a folder that is incomplete or damaged,
    or whose pickled parts name anything but tensor metadata.
    """
    for name in (STATE_FILE, INDEX_FILE, OBJECTS_FILE, BACKEND_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: {name} is missing; load another step")
    document = _read_document(folder / STATE_FILE)
    check_objects(folder / OBJECTS_FILE)
    return document, read_index(folder / INDEX_FILE)


def write_state(
    folder: Path,
    *,
    engines: Mapping[str, Mapping[str, int]],
    models: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
) -> None:
    """Write ``state.json`` (see ``read_checkpoint``) into a folder that is to be a checkpoint, and flush it."""
    document = {
        "format": FORMAT,
        "megatron_core": version("megatron-core"),
        "torch": torch.__version__,
        "engines": dict(engines),
        "models": dict(models),
        "state": dict(state),
    }
    with (folder / STATE_FILE).open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, _ = document["format"], dict(document["state"])
        if found != FORMAT:
            raise CheckpointError(f"{path.parent} has checkpoint format {found}; this version reads {FORMAT}")
        for progress in document["engines"].values():
            if progress.keys() != _PROGRESS_KEYS or not all(type(n) is int for n in progress.values()):
                raise ValueError(f"an engine's progress is {progress}")
        for role, model in document["models"].items():
            if role not in document["engines"] or model.keys() != _MODEL_KEYS:
                raise ValueError(f"the model of {role!r} is {model}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); load another step") from error
    return document
