"""``prism-convert check A B``: two models, in whichever form, compared tensor by tensor and bit by bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.check import CheckConfig
from prism_megatron.conversion.checkpoints.folder import companions_folder, is_checkpoint
from prism_megatron.conversion.checkpoints.model_names import FORMS, folder_of
from prism_megatron.conversion.checkpoints.source import CheckpointSource
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.compare import TensorComparison, Tensors, compare, num_bytes
from prism_megatron.conversion.expert_layout import detect_expert_layout
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.errors import ConfigError
from prism_megatron.jobs.convert import Role, role_of
from prism_megatron.jobs.model_folder import mappings_of
from prism_megatron.observability.transfer import TransferProgress, format_bytes

_NUM_SHOWN = 10
OPTIMIZER_PREFIX = "optimizer."


class StoredTensors(Tensors):
    """A checkpoint's tensors under the names they are stored by."""

    def __init__(self, folder: TorchDistFolder, *, optimizer: bool) -> None:
        self._folder = folder
        self._names = [key for key in folder.keys() if optimizer or not key.startswith(OPTIMIZER_PREFIX)]  # noqa: SIM118

    def names(self) -> Sequence[str]:
        """All keys, or those of weights."""
        return self._names

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: self._folder.shape(name) for name in self._names}

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The number format of every tensor."""
        return {name: self._folder.dtype(name) for name in self._names}

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of dimension 0."""
        return self._folder.read(name, start, stop)


@dataclass(frozen=True)
class Check:
    """What ``check`` found. ``compared`` are the names that both folders have, in their order."""

    a: str
    b: str
    compared: Sequence[TensorComparison]
    only_in_a: Sequence[str]
    only_in_b: Sequence[str]
    num_bytes: int
    notes: Sequence[str]

    @property
    def equal(self) -> bool:
        """The same names, and every tensor equal to the bit."""
        return not self.only_in_a and not self.only_in_b and all(one.equal for one in self.compared)

    def text(self) -> str:
        """The first differences, then a summary line."""
        different = [str(one) for one in self.compared if not one.equal]
        lines = [*self.notes, *_first(different, "differ"), *_first(self.only_in_a, f"are in {self.a} only")]
        lines += _first(self.only_in_b, f"are in {self.b} only")
        size = f"{len(self.compared)} tensors, {format_bytes(self.num_bytes)}"
        if self.equal:
            return "\n".join([*lines, f"equal: {size}, every bit; hash of all {self.hash_of_all()}"])
        missing = len(self.only_in_a) + len(self.only_in_b)
        return "\n".join([*lines, f"different: {len(different)} of {size} compared; {missing} in one folder only"])

    def hash_of_all(self) -> str:
        """BLAKE2b over the names and hashes of all tensors in order of names (A's where they differ)."""
        text = "".join(f"{one.name}\0{one.hash_a}\n" for one in self.compared)
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

    def as_json(self) -> str:
        """All hashes."""
        tensors = [
            {
                "name": one.name,
                "format": [one.format_a, one.format_b],
                "blake2b": [one.hash_a, one.hash_b],
                "num_different": one.num_different,
                "max_difference": _as_json(one.max_difference),
            }
            for one in self.compared
        ]
        found = {"equal": self.equal, "a": self.a, "b": self.b, "tensors": tensors, "only_in_a": list(self.only_in_a),
                 "only_in_b": list(self.only_in_b), "notes": list(self.notes)}  # fmt: skip
        return json.dumps(found, indent=2, allow_nan=False)


def check_weights(config: CheckConfig) -> Check:
    """Compare the folders. Raises PrismError for one that cannot be read.

    Two model folders, or two checkpoints, are compared under the names they have. A checkpoint is held against a model
    folder under that folder's names and layout of experts, and against a checkpoint without optimizer by its weights.
    Config, tokenizer and ``state.json`` are not compared.
    """
    if not (config.a and config.b):
        raise ConfigError(f"check compares two models; name both: each {FORMS}")
    paths = [folder_of(name, flag="check", fetch=True) for name in (config.a, config.b)]
    kinds = [is_checkpoint(path) for path in paths]
    if config.role is not None and kinds[0] == kinds[1]:
        raise ConfigError(
            f"--role {config.role} picks what of a checkpoint is held against a model folder; leave it out"
        )
    notes: list[str] = []
    if all(kinds):
        first, second = (TorchDistFolder(path) for path in paths)
        both = _has_optimizer(first) and _has_optimizer(second)
        if _has_optimizer(first) != _has_optimizer(second):
            notes.append("one of the checkpoints has no optimizer state: only weights are compared")
        a, b = StoredTensors(first, optimizer=both), StoredTensors(second, optimizer=both)
        return _check(config, a, b, notes)
    if not any(kinds):
        return _check(config, HFFolder(paths[0]), HFFolder(paths[1]), notes)
    folder = TorchDistFolder(paths[0] if kinds[0] else paths[1])
    model = HFFolder(paths[1] if kinds[0] else paths[0])
    role = role_of(folder, config.role)
    notes.append(f"{folder.folder}: weights of the {role}")
    source = hf_source(folder, role, model)
    return _check(config, source, model, notes) if kinds[0] else _check(config, model, source, notes)


def hf_source(folder: TorchDistFolder, role: Role, like: HFFolder) -> CheckpointSource:
    """A role's tensors under the names that the model folder ``like`` has them, in its layout of experts."""
    companions = companions_folder(folder.folder, role)
    layout = detect_expert_layout(like, Qwen3VLShape.from_folder(companions)) if role == "policy" else None
    return CheckpointSource(folder, role, mappings_of(companions, layout), aliases=like.names())


def _as_json(number: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: they are texts."""
    return number if number is None or math.isfinite(number) else str(number)


def _has_optimizer(folder: TorchDistFolder) -> bool:
    return any(key.startswith(OPTIMIZER_PREFIX) for key in folder.keys())  # noqa: SIM118 - a folder is no mapping


def _check(config: CheckConfig, a: Tensors, b: Tensors, notes: Sequence[str]) -> Check:
    shapes, dtypes = a.shapes(), a.dtypes()
    total = sum(num_bytes(shapes[name], dtypes[name]) for name in set(a.names()) & set(b.names()))
    progress = TransferProgress("check", total_bytes=total)
    compared = list(compare(a, b, progress.add))
    progress.finish()
    return Check(
        a=config.a,
        b=config.b,
        compared=compared,
        only_in_a=sorted(set(a.names()) - set(b.names())),
        only_in_b=sorted(set(b.names()) - set(a.names())),
        num_bytes=total,
        notes=notes,
    )


def _first(lines: Sequence[str], what: str) -> list[str]:
    """The first of many lines under a heading."""
    if not lines:
        return []
    rest = [f"  … and {len(lines) - _NUM_SHOWN} more"] if len(lines) > _NUM_SHOWN else []
    return [f"{len(lines)} tensors {what}:", *(f"  {line}" for line in lines[:_NUM_SHOWN]), *rest]
