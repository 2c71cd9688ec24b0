"""A checkpoint's tensors under their Hugging Face names, merged as they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.ops import Box
from prism_megatron.conversion.row_order import origins_of
from prism_megatron.conversion.to_hf import check_keys
from prism_megatron.conversion.to_megatron import checkpoint_key
from prism_megatron.conversion.torch_dist import TorchDistFolder


class CheckpointSource(TensorSource):
    """One role's weights (a ``TensorSource``). Only rows that are asked for are read, and fused experts one by one."""

    def __init__(
        self, folder: TorchDistFolder, role: str, mappings: Sequence[WeightMapping], *, aliases: Sequence[str] = ()
    ) -> None:
        """``mappings`` are the role's; ``aliases`` are the tied repeats to present as well.

        Raises ConversionError unless the folder holds exactly the role's parameters.
        """
        check_keys(mappings, folder, role)
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
        """The shape of every tensor."""
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
        rows = torch.empty((stop - start, *shape[1:]), dtype=self._folder.dtype(key))
        width = self._folder.shape(key)[1 if expert is None else 2 :]
        for run in origins_of(mapping, part, start, stop):
            box = Box((run.target, *(0 for _ in width)), (run.count, *width))
            if expert is not None:
                box = Box((expert, *box.offset), (1, *box.size))
            rows[run.origin - start : run.origin - start + run.count] = self._folder.read_box(key, box).reshape(
                run.count, *shape[1:]
            )
        return rows

    def _key(self, mapping: WeightMapping) -> tuple[str, int | None]:
        return checkpoint_key(self._role, mapping.parameter)


def _one(expert: int | None) -> tuple[int, int]:
    assert expert is not None
    return expert, expert + 1
