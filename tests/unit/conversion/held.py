"""Tensors of a dict as a source, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prism_megatron.conversion.mapping import TensorSource


class Held(TensorSource):
    """``tensors`` by name; ``read_whole`` lists the names that were read whole."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.read_whole: list[str] = []

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        self.read_whole.append(name)
        return self.tensors[name]

    def get_slice(self, name: str, index: int) -> Tensor:
        return self.tensors[name][index]

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self.tensors[name]
        return (tensor if tensor.dim() else tensor[None])[start:stop]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}
