"""How many bytes of a model a rank holds while it trains: the one place of the formula.

With W weights on a rank, of which T train, split over D data-parallel ranks (for experts: those that hold the same
ones), in a dtype of b bytes::

    parameters  b W
    gradients   4 T                                    summed in fp32, whole on every rank
    optimizer   (8 + m) T / D                          two moments, and m = 4 for an fp32 master where the dtype is bf16

D is 1 without --distributed-optimizer. W follows from the mapping of weights, whose ops say what tensor parallelism
cuts and what it copies; vocabularies are padded. Megatron pads its buffers beyond that: by fewer than 64 elements a
parameter and 128 D a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.mapping import TensorSource, WeightMapping

_GRADIENT, _MOMENTS, _MASTER = 4, 8, 4
_EXPERT = ".local_experts."
"""In the global name of an expert's parameter, however the folder stores experts."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank, activations aside."""

    parameters: int
    gradients: int
    optimizer: int


def bytes_of_rank(
    mappings: Iterable[WeightMapping],
    parallel: ParallelConfig,
    *,
    world_size: int,
    dtype: torch.dtype,
    is_frozen: Callable[[str], bool],
) -> RankBytes:
    """The formula for the weights of ``mappings``: a whole model's, or those of one pipeline stage.

    ``is_frozen`` is asked by the name of a parameter in its chunk. A stage's copy of a tied embedding counts as one
    more mapping. ``parallel`` must split them evenly.
    """
    stage = world_size // parallel.pp
    of_experts = stage // (parallel.ep * parallel.expert_tp)
    of_others = stage // parallel.tp  # context-parallel ranks hold copies too
    master = _MASTER if dtype == torch.bfloat16 else 0
    parameters = gradients = 0.0
    optimizer = 0.0
    for mapping in mappings:
        is_expert = _EXPERT in mapping.parameter
        shard = mapping.op.split(mapping.read(_Shapes(mapping)), parallel.expert_tp if is_expert else parallel.tp)[0]
        numel = shard.numel() / (parallel.ep if is_expert else 1)
        parameters += numel * dtype.itemsize
        if not is_frozen(mapping.parameter):
            gradients += numel * _GRADIENT
            shares = (of_experts if is_expert else of_others) if parallel.distributed_optimizer else 1
            optimizer += numel * (_MOMENTS + master) / shares
    return RankBytes(round(parameters), round(gradients), round(optimizer))


class _Shapes(TensorSource):
    """The tensors of one mapping without their contents."""

    def __init__(self, mapping: WeightMapping) -> None:
        assert mapping.hf_shapes is not None, mapping
        self._shapes = dict(zip(mapping.hf_names, mapping.hf_shapes, strict=True))

    def names(self) -> list[str]:
        return list(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> dict[str, torch.dtype]:
        return dict.fromkeys(self._shapes, torch.float32)

    def get(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")
