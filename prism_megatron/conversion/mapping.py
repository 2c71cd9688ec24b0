"""One list that names every weight in both worlds; import, export, weight sync and verification read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prism_megatron.conversion.ops import Op


@dataclass(frozen=True)
class WeightMapping:
    """``hf_names`` (one or several Hugging Face tensors) and one Megatron parameter, tied by an invertible op.

    ``parameter`` is the name in the *global* model, with global layer and expert numbers.
    ``optional_alias`` names a Hugging Face tensor that may repeat this one (a tied ``lm_head.weight``).
    ``hf_shapes`` are the shapes of ``hf_names``; ``conversion.verify`` holds a folder to them where they are given.
    """

    hf_names: tuple[str, ...]
    parameter: str
    op: Op
    optional_alias: str | None = None
    hf_shapes: tuple[tuple[int, ...], ...] | None = None


class TensorSource(Protocol):
    """Named full tensors, read one at a time."""

    def names(self) -> Sequence[str]: ...

    def get(self, name: str) -> Tensor: ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
