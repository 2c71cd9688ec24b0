"""Weights of a discriminator that has learned nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model_providers.moe_discriminator.upcycle import keyed_normal
from prism_megatron.conversion.mapping import TensorSource

RANDOM_STD = 0.05


@dataclass(frozen=True, eq=False)
class RandomSource(TensorSource):
    """Fresh weights with the names and shapes of ``like``: norms 1, everything else N(0, 0.05²), keyed by the seed."""

    like: TensorSource
    seed: int

    def names(self) -> Sequence[str]:
        return self.like.names()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.like.shapes()

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(self.like.names(), torch.float32)

    def get(self, name: str) -> torch.Tensor:
        shape = self.like.shapes()[name]
        if "norm" in name:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return keyed_normal(shape, std=RANDOM_STD, seed=self.seed, name=name)
