"""What a checkpoint folder is made of, and the checks that come before anything of it is used.

A folder ``step_000040/`` is a Megatron ``torch_dist`` checkpoint (tensors under names that do not depend on the layout)
with two things beside it: ``state.json``, and ``hf/{role}/`` with the files that make a role's weights a Hugging Face
model (config, tokenizer, chat template, preprocessor). It holds tensors and JSON only: Megatron's ``common.pt`` is
empty, and what is still pickled, the index of the tensors, is read by ``conversion/checkpoints/pickles.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_megatron.errors import CheckpointError

if TYPE_CHECKING:  # the command line asks here for a folder's config, and stays light
    from torch.distributed.checkpoint.metadata import Metadata

FORMAT = 2
STATE_FILE = "state.json"
INDEX_FILE = ".metadata"
OBJECTS_FILE = "common.pt"
BACKEND_FILE = "metadata.json"
COMPANIONS_FOLDER = "hf"
RUN_CONFIG, CHECKPOINTS, EXPORT = "config.yaml", "checkpoints", "hf"
"""What a run's folder has of these: its configuration, the folder of its checkpoints, the model that it exported."""
ROLES = ("policy", "discriminator")

_PROGRESS_KEYS = {"steps_taken", "adam_step"}
_MODEL_KEYS = {"expert_layout", "aliases"}
_EXPERT_LAYOUTS = (None, "transformers", "hub", "per_expert")
"""Those of ``conversion/expert_layout.py``, which needs torch; None for a model without experts."""
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class ModelFiles:
    """What a checkpoint keeps of a role beside its tensors: all it takes to make a Hugging Face folder again.

    ``files`` are contents by file name; ``aliases`` are the tied repeats that the folder it came from holds.
    """

    files: Mapping[str, bytes]
    aliases: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the files into ``folder``, which is made, and flush them and it."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            with (folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        flush_folder(folder)


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` is a committed checkpoint, of training or converted."""
    return (folder / STATE_FILE).is_file()


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a run, which has begun at least."""
    return (folder / RUN_CONFIG).is_file()


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step_{step:06d}"


def latest(root: Path) -> Path | None:
    """``root`` itself if it is a checkpoint, else its newest complete ``step_*``, else None; leftovers do not count."""
    if is_checkpoint(root):
        return root
    return max((path.parent for path in root.glob(f"step_*/{STATE_FILE}")), default=None, key=lambda path: path.name)


def latest_whole(root: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest complete ``step_*`` below ``root`` that has all its bytes, and why newer ones are no good.

    Nothing is read but ``state.json`` and the files' sizes. Where none is whole it is the newest one, whose reading
    says what is wrong.
    """
    damaged: dict[Path, str] = {}
    folders = sorted(filter(is_checkpoint, root.glob("step_*")), key=lambda path: path.name)
    for folder in reversed(folders):
        try:
            check_sizes(folder, read_state(folder))
        except CheckpointError as error:
            damaged[folder] = str(error)
        else:
            return folder, damaged
    return (folders[-1] if folders else None), {}


def check_sizes(folder: Path, document: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a file has fewer bytes than ``document``, the folder's state, says were written.

    What an earlier version wrote says nothing of sizes. A checkpoint that is named is not held to them: its owner may
    have changed a model's ``config.json``, and tensors are held to the index.
    """
    try:
        sizes = {str(name): int(size) for name, size in document.get("sizes", {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} is damaged ({error!r}); load another step") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / STATE_FILE} names {name[:80]!r}, which is outside; load another step")
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise CheckpointError(f"{path} has {found} of the {size} bytes that were written; load another step")


def companions_folder(folder: Path, role: str) -> Path:
    """Where a checkpoint keeps the files that make ``role`` a Hugging Face model folder, weights aside."""
    return folder / COMPANIONS_FOLDER / role


def files_folder(folder: Path, role: str) -> Path:
    """Where config and tokenizer of a model lie: in a Hugging Face folder itself, or beside a checkpoint's tensors.

    Raises CheckpointError for a checkpoint without ``role``.
    """
    if not is_checkpoint(folder):
        return folder
    _check_links(folder)
    if role not in read_state(folder)["models"]:
        raise CheckpointError(f"{folder} holds no {role}; give a checkpoint of one, or a Hugging Face folder")
    return companions_folder(folder, role)


def flush_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Metadata]:
    """``state.json`` and the index of tensors, after all checks that need no tensor.

    ``state.json`` is ``{"format", "megatron_core", "torch", "engines": {role: {"steps_taken", "adam_step"}}, "models":
    {role: {"expert_layout", "aliases"}}, "state", "sizes": {file: bytes}}``. Raises CheckpointError for a folder that
    is incomplete or damaged, that reaches for files outside of it, or whose pickled parts name anything but tensor
    metadata.
    """
    from prism_megatron.conversion.checkpoints.index import check_index
    from prism_megatron.conversion.checkpoints.pickles import check_objects, read_index

    for name in (STATE_FILE, INDEX_FILE, OBJECTS_FILE, BACKEND_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: {name} is missing; load another step")
    _check_links(folder)
    # torch goes on to the index of a rank, with plain pickle, where it cannot read that of all.
    if others := sorted(path.name for path in folder.glob(f"*{INDEX_FILE}") if path.name != INDEX_FILE):
        raise CheckpointError(f"{folder} holds a second index, {others[0]!r}; do not use this checkpoint")
    document = read_state(folder)
    _check_backend(folder / BACKEND_FILE)
    check_objects(folder / OBJECTS_FILE)
    index = read_index(folder / INDEX_FILE)
    check_index(index, folder)
    return document, index


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` (see ``read_checkpoint``). Raises CheckpointError for a damaged one."""
    path = folder / STATE_FILE
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, _ = document["format"], dict(document["state"])
        if found != FORMAT:
            raise CheckpointError(f"{path.parent} has checkpoint format {found!r}; this version reads {FORMAT}")
        if not all(isinstance(document[name], str) for name in ("megatron_core", "torch")):
            raise ValueError("versions are no text")
        for role, progress in document["engines"].items():
            if role not in ROLES:
                raise ValueError(f"there is no role {role!r}")
            if progress.keys() != _PROGRESS_KEYS or not all(type(n) is int for n in progress.values()):
                raise ValueError(f"an engine's progress is {progress}")
        for role, model in document["models"].items():
            if role not in document["engines"] or model.keys() != _MODEL_KEYS:
                raise ValueError(f"the model of {role!r} is {model}")
            layout, aliases = model["expert_layout"], model["aliases"]
            if layout not in _EXPERT_LAYOUTS or not all(isinstance(name, str) for name in aliases):
                raise ValueError(f"the model of {role!r} is {model}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); load another step") from error
    return document


def write_state(
    folder: Path,
    *,
    engines: Mapping[str, Mapping[str, int]],
    models: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
) -> None:
    """Write ``state.json`` (see ``read_checkpoint``) into a folder that is to be a checkpoint, and flush it.

    Everything else is there already: how long each file is is written down.
    """
    document = {
        "format": FORMAT,
        "megatron_core": version("megatron-core"),
        "torch": version("torch"),
        "engines": dict(engines),
        "models": dict(models),
        "state": dict(state),
        "sizes": {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }
    with (folder / STATE_FILE).open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _check_backend(path: Path) -> None:
    """Megatron imports the readers that this file names; 0.19.2 no longer names that of common objects."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        named = {"sharded_backend": found["sharded_backend"], **found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); load another step") from error
    if {**_BACKEND, **named} != _BACKEND:
        raise CheckpointError(f"{path} names {named}, not {_BACKEND}; do not use this checkpoint")


def _check_links(folder: Path) -> None:
    """Raise CheckpointError where a link leads out of the folder: what lies there is no part of the checkpoint."""
    root = folder.resolve()
    for path in (*folder.iterdir(), *folder.glob(f"{COMPANIONS_FOLDER}/*"), *folder.glob(f"{COMPANIONS_FOLDER}/*/*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise CheckpointError(f"{path} links to {path.readlink()}, outside the checkpoint; do not use it")
