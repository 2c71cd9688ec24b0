"""A checkpoint's tensors under their Hugging Face names, merged as they are asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prism_megatron.conversion.checkpoints.row_order import origins_of
from prism_megatron.conversion.checkpoints.to_megatron import checkpoint_key, checkpoint_tensors
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.ops import Box
from prism_megatron.errors import ConversionError


class CheckpointSource(TensorSource):
    """One role's weights (a ``TensorSource``). Only rows that are asked for are read, and fused experts one by one."""

    def __init__(
        self, folder: TorchDistFolder, role: str, mappings: Sequence[WeightMapping], *, aliases: Sequence[str] = ()
    ) -> None:
        """``mappings`` are the role's; ``aliases`` are the tied repeats to present as well.

        Raises ConversionError unless the folder holds exactly the role's parameters.
        """
        _check_keys(mappings, folder, role)
        self._folder = folder
        self._role = role
        self._mappings: dict[str, list[tuple[WeightMapping, int]]] = {}
        for mapping in mappings:
            for part, name in enumerate(mapping.hf_names):
                self._mappings.setdefault(name, []).append((mapping, part))
            if mapping.optional_alias is not None and mapping.optional_alias in aliases:
                self._mappings[mapping.optional_alias] = [(mapping, 0)]

    def names(self) -> Sequence[str]:
        """All Hugging Face names, sorted."""
        return sorted(self._mappings)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, in the order of the mappings, which is that of the layers."""
        return {name: (found[0][0].hf_shapes or ())[found[0][1]] for name, found in self._mappings.items()}

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The number format of every tensor, which is that of the parameter it is part of."""
        return {name: self._folder.dtype(self._key(found[0][0])[0]) for name, found in self._mappings.items()}

    def get(self, name: str) -> Tensor:
        """One full tensor."""
        return self.get_rows(name, 0, self.shapes()[name][0])

    def get_slice(self, name: str, index: int) -> Tensor:
        """One entry of dimension 0."""
        return self.get_rows(name, index, index + 1)[0]

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of dimension 0."""
        mapping, part = self._mappings[name][0]
        key, expert = self._key(mapping)
        if mapping.expert is not None:
            stacked = self._mappings[name][start:stop]
            return torch.stack([m.op.merge([self._folder.read(key, *_one(m.expert))[0]])[p] for m, p in stacked])
        shape = (mapping.hf_shapes or ())[part]
        width = self._folder.shape(key)[1 if expert is None else 2 :]
        pieces = []
        for run in origins_of(mapping, part, start, stop):
            box = Box((run.target, *(0 for _ in width)), (run.count, *width))
            if expert is not None:
                box = Box((expert, *box.offset), (1, *box.size))
            pieces.append(self._folder.read_box(key, box).view(run.count, *shape[1:]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _key(self, mapping: WeightMapping) -> tuple[str, int | None]:
        return checkpoint_key(self._role, mapping.parameter)


def _check_keys(mappings: Sequence[WeightMapping], folder: TorchDistFolder, role: str) -> None:
    """Raise ConversionError unless the checkpoint's tensors of ``role`` are those of the mappings, shapes included."""
    wanted = checkpoint_tensors(role, mappings)
    held = {key for key in folder.keys() if key.startswith(f"{role}.")}  # noqa: SIM118 - no mapping
    for problem, keys, others in (
        ("lacks {} tensors of the model, first", wanted.keys() - held, held - wanted.keys() or held),
        ("holds {} tensors that are not the model's, first", held - wanted.keys(), wanted.keys()),
    ):
        if keys:
            near = difflib.get_close_matches(min(keys), sorted(others), n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ConversionError(f"{folder.folder} {problem.format(len(keys))} {min(keys)!r}{hint}")
    for key, shape in wanted.items():
        if folder.shape(key) != shape:
            raise ConversionError(
                f"{folder.folder}: {key!r} has shape {folder.shape(key)}, but the model's config makes it {shape}"
            )


def _one(expert: int | None) -> tuple[int, int]:
    assert expert is not None
    return expert, expert + 1
