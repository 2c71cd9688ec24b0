"""A dense Qwen3-VL as a discriminator: every decoder MLP becomes the starting point of all its layer's experts.

Komatsuzaki et al., 2212.05055 (sparse upcycling); PRISM's constants (docs/method.md, section 3): experts get
N(0, 0.01²) noise, router and scalar head start at N(0, 0.02²), everything else is copied.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model_providers.moe_discriminator.mapping import SCORE, dense_name, router_name
from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.mapping import LM_HEAD, TEXT, expert_name
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.errors import ConversionError

_PARTS = ("gate", "up", "down")


def keyed_normal(shape: tuple[int, ...], *, std: float, seed: int, name: str) -> Tensor:
    """N(0, std²) in float32, drawn from (seed, name) alone: the same in every layout and order of reading."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) * std


class _LastDrawn(threading.local):
    """The tensor that each thread drew last. A copy in another process begins empty."""

    name = ""
    tensor: Tensor | None = None

    def __reduce__(self) -> tuple[type[_LastDrawn], tuple[()]]:
        return _LastDrawn, ()


class UpcycledSource(TensorSource):
    """The tensors of a discriminator, made from a dense model's as they are asked for (a ``TensorSource``)."""

    def __init__(
        self,
        dense: TensorSource,
        shape: Qwen3VLShape,
        towers: Towers | None,
        *,
        seed: int,
        expert_std: float = 0.01,
        init_std: float = 0.02,
    ) -> None:
        """``expert_std`` is the noise on every expert's copy, ``init_std`` that of the fresh router and head.

        Without ``towers`` the MLPs are copied, and the head alone is fresh. Tensors keep the dense model's dtype.
        Raises ConversionError where ``dense`` lacks a decoder MLP.
        """
        self._dense = dense
        self._seed = seed
        self._last = _LastDrawn()
        self._expert_std = expert_std
        self._init_std = init_std
        self._dense_dtypes = dense.dtypes()
        self._shapes = dict(dense.shapes())
        self._shapes.pop(LM_HEAD, None)
        self._copied_from: dict[str, str] = {}
        self._fresh = {SCORE: (1, shape.text.hidden)}
        for layer in range(shape.text.num_layers):
            if towers is not None:
                self._fresh[router_name(layer)] = (towers.num_experts, shape.text.hidden)
            for part in _PARTS:
                self._copy_mlp(dense_name(layer, part), layer, part, towers)
        self._shapes |= self._fresh

    def _copy_mlp(self, origin: str, layer: int, part: str, towers: Towers | None) -> None:
        if origin not in self._shapes:
            raise ConversionError(
                f"the model to upcycle has no {origin}; a discriminator is made from a dense Qwen3-VL"
            )
        if towers is None:
            return
        mlp_shape = self._shapes.pop(origin)
        for expert in range(towers.num_experts):
            name = expert_name(layer, expert, part)
            self._shapes[name] = mlp_shape
            self._copied_from[name] = origin

    def names(self) -> Sequence[str]:
        """Names of all discriminator tensors."""
        return list(self._shapes)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return dict(self._shapes)

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """As the dense model's; what is fresh has that of its final norm."""
        return {name: self._dtype(name) for name in self._shapes}

    def get(self, name: str) -> Tensor:
        """One tensor, the same whenever it is read. Raises KeyError for a name that is not in ``names()``."""
        if name in self._fresh:
            fresh = keyed_normal(self._fresh[name], std=self._init_std, seed=self._seed, name=name)
            return fresh.to(self._dtype(name))
        if name in self._copied_from:
            dense = self._dense.get(self._copied_from[name])
            noise = keyed_normal(tuple(dense.shape), std=self._expert_std, seed=self._seed, name=name)
            return (dense.float() + noise).to(dense.dtype)
        if name not in self._shapes:
            raise KeyError(name)
        return self._dense.get(name)

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """A part of a tensor. What is drawn is kept until this thread asks for another: its parts come in a row."""
        if name not in self._fresh and name not in self._copied_from:
            return self._dense.get_rows(name, start, stop)
        if self._last.name != name:
            self._last.name, self._last.tensor = "", None
            self._last.tensor = self.get(name)
            self._last.name = name
        assert self._last.tensor is not None
        return self._last.tensor[start:stop].clone()

    def _dtype(self, name: str) -> torch.dtype:
        return self._dense_dtypes[f"{TEXT}.norm.weight" if name in self._fresh else self._copied_from.get(name, name)]
