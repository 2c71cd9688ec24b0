"""One list that names every weight in both worlds; import, export, weight sync and verification read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prism_megatron.conversion.ops import Op


@dataclass(frozen=True)
class WeightMapping:
    """``hf_names`` (one or several Hugging Face tensors) and one Megatron parameter, tied by an invertible op.

    ``parameter`` is the name in the *global* model, with global layer and expert numbers.
    ``optional_alias`` names a Hugging Face tensor that may repeat this one (a tied ``lm_head.weight``).
    ``hf_shapes`` are the shapes of ``hf_names``; ``conversion.verify`` holds a folder to them where they are given.
    ``expert`` says that the Hugging Face tensors hold all experts of a layer along dimension 0, and that the op reads
    this one's slices; the layer's other experts have mappings of the same names.
    """

    hf_names: tuple[str, ...]
    parameter: str
    op: Op
    optional_alias: str | None = None
    hf_shapes: tuple[tuple[int, ...], ...] | None = None
    expert: int | None = None

    def read(self, source: TensorSource) -> list[Tensor]:
        """What the op splits: the named tensors, or one expert's slices of them and nothing more."""
        if self.expert is None:
            return [source.get(name) for name in self.hf_names]
        return [source.get_slice(name, self.expert) for name in self.hf_names]


class TensorSource(Protocol):
    """Named full tensors, read one at a time. Classes that derive from it may read slices through ``get``."""

    def names(self) -> Sequence[str]: ...

    def get(self, name: str) -> Tensor: ...

    def get_slice(self, name: str, index: int) -> Tensor:
        """``get(name)[index]``; where tensors are read from a file, only this part of it."""
        return self.get(name)[index]

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """``get(name)[start:stop]``; where tensors are read from a file, only this part of it."""
        return self.get(name)[start:stop]

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtypes(self) -> Mapping[str, torch.dtype]: ...
