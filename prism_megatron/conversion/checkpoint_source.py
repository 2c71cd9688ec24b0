"""A checkpoint's tensors under their Hugging Face names, merged as they are asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.torch_dist import TorchDistFolder
from prism_megatron.errors import CheckpointError

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


class CheckpointSource(TensorSource):
    """One role's weights (a ``TensorSource``): a tensor, or one expert's slice of it, is read and merged at a time."""

    def __init__(self, folder: TorchDistFolder, role: str, mappings: Sequence[WeightMapping]) -> None:
        """``mappings`` are the role's. Raises CheckpointError where the folder lacks one of their parameters."""
        self._folder = folder
        self._role = role
        self._places: dict[str, dict[int | None, tuple[WeightMapping, int]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        held = set(folder.keys())
        for mapping in mappings:
            key, _ = self._key(mapping)
            if key not in held:
                raise CheckpointError(f"{folder.folder} holds no {key!r}; it is not a checkpoint of this model")
            for which, (name, shape) in enumerate(zip(mapping.hf_names, mapping.hf_shapes or (), strict=True)):
                self._places.setdefault(name, {})[mapping.expert] = mapping, which
                self._shapes[name] = shape
        self._last: tuple[WeightMapping, list[Tensor]] | None = None

    def names(self) -> Sequence[str]:
        """All Hugging Face names, in the order of the mappings."""
        return list(self._places)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return dict(self._shapes)

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The number format of every tensor."""
        return {
            name: self._folder.dtype(self._key(next(iter(places.values()))[0])[0])
            for name, places in self._places.items()
        }

    def get(self, name: str) -> Tensor:
        """One full tensor."""
        places = self._places[name]
        if None in places:
            return self._merged(*places[None])
        return torch.stack([self._merged(*places[expert]) for expert in range(len(places))])

    def get_slice(self, name: str, index: int) -> Tensor:
        """One entry of dimension 0; of fused experts no more than one is read."""
        places = self._places[name]
        return self.get(name)[index] if None in places else self._merged(*places[index])

    def _merged(self, mapping: WeightMapping, which: int) -> Tensor:
        """One of the tensors of a mapping; the others, which are usually asked for next, stay at hand."""
        if self._last is None or self._last[0] is not mapping:
            key, expert = self._key(mapping)
            if expert is None:
                stored = self._folder.read(key, 0, self._folder.shape(key)[0])
            else:
                stored = self._folder.read(key, expert, expert + 1)[0]
            self._last = mapping, mapping.op.merge([stored])
        return self._last[1][which]

    def _key(self, mapping: WeightMapping) -> tuple[str, int | None]:
        """The name under which a parameter is stored; experts of a layer are stacked along dimension 0 there."""
        found = _EXPERT.search(mapping.parameter)
        key = _EXPERT.sub(".experts.", mapping.parameter)
        return f"{self._role}.{key}", None if found is None else int(found[1])
