"""Folders in block-wise FP8, read as if they had never been quantised.

The format is that of transformers' ``FineGrainedFP8Config`` (DeepSeek-V3, 2412.19437, section 3.3): beside a tensor
``X`` of ``float8_e4m3fn`` stands ``X_scale_inv`` with one factor per block of its last two dimensions, ``[⌈rows / block
rows⌉, ⌈columns / block columns⌉]`` (so ``q_proj.weight`` has ``q_proj.weight_scale_inv``), and a weight is the number
times its block's factor, in spite of the name. What is not quantised is stored plainly. Experts come under any of the
names of ``conversion.expert_layout``: vllm.rs, which serves Qwen3-VL in this format, reads one tensor per expert, or
``experts.gate_up_proj`` ``[experts, hidden, 2 · width]`` with ``experts.gate_up_proj_scale_inv`` whose blocks lie in
the same order. The published Qwen3-VL-*-FP8 folders were not at hand when this was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.errors import ConversionError

CONFIG_KEY = "quantization_config"
SCALE_SUFFIX = "_scale_inv"
_SCALE_DTYPES = (torch.float32, torch.bfloat16)
_ADVICE = "give the model that it was made from, or one in block-wise FP8 (quant_method 'fp8' with weight_block_size)"


@dataclass(frozen=True)
class BlockSize:
    """Rows and columns of the blocks that share one scale. Example: 128 by 128."""

    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a tensor; the last block of a row or column may be smaller."""
        return (*shape[:-2], -(-shape[-2] // self.rows), -(-shape[-1] // self.columns))


def quantised_blocks(config: Mapping[str, Any], where: str) -> BlockSize | None:
    """The block size of a folder by its parsed ``config.json``; None for one that is not quantised.

    Raises ConversionError, naming the file ``where``, for any other kind of quantisation.
    """
    settings = config.get(CONFIG_KEY)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ConversionError(f"{where}: {CONFIG_KEY} is {settings!r}, expected a JSON object")
    if (method := settings.get("quant_method")) != "fp8":
        raise ConversionError(f"{where}: weights are quantised by {method!r}, which is not read; {_ADVICE}")
    for key, read in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        if settings.get(key, read) != read:
            raise ConversionError(f"{where}: {key} is {settings[key]!r}, and only {read!r} is read; {_ADVICE}")
    block = settings.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)):
        raise ConversionError(f"{where}: weight_block_size is {block!r}, expected two positive sizes; {_ADVICE}")
    return BlockSize(*block)


def dequantised_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` as that of the same model not quantised."""
    return {key: value for key, value in config.items() if key != CONFIG_KEY}


class DequantisedSource(TensorSource):
    """``source`` in block-wise FP8 under its plain names; no scales are among them.

    Quantised tensors come out in ``dtype``, others as they are stored. A row of blocks is multiplied at a time, in
    float32.
    """

    def __init__(self, source: TensorSource, block: BlockSize, dtype: torch.dtype) -> None:
        """Raises ConversionError where a quantised tensor has no scales, or scales of another shape, or no blocks, and
        for scales that belong to nothing."""
        self._source = source
        self._block = block
        self._dtype = dtype
        dtypes, shapes = dict(source.dtypes()), dict(source.shapes())
        self._quantised = {name for name, stored in dtypes.items() if stored == torch.float8_e4m3fn}
        for name in sorted(self._quantised):
            self._check(name, shapes[name], name + SCALE_SUFFIX, dtypes, shapes)
        scales = {name + SCALE_SUFFIX for name in self._quantised}
        if strangers := sorted(name for name in dtypes if name.endswith(SCALE_SUFFIX) and name not in scales):
            raise ConversionError(f"{strangers[0]!r} scales {strangers[0].removesuffix(SCALE_SUFFIX)!r}, which is not "
                                  "stored in FP8; copy the folder again")  # fmt: skip
        self._shapes = {name: shape for name, shape in shapes.items() if name not in scales}
        self._dtypes = {name: dtype if name in self._quantised else dtypes[name] for name in self._shapes}

    def _check(
        self,
        name: str,
        shape: tuple[int, ...],
        scale: str,
        dtypes: Mapping[str, torch.dtype],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        if scale not in shapes:
            raise ConversionError(f"{name!r} is stored in FP8, but its scales {scale!r} are missing")
        if len(shape) not in (2, 3):
            raise ConversionError(f"{name!r} {shape} is stored in FP8, but is neither a matrix nor a stack of them")
        if shapes[scale] != self._block.grid(shape):
            raise ConversionError(
                f"{scale!r} has shape {shapes[scale]}, but blocks of {self._block.rows} by {self._block.columns} make "
                f"it {self._block.grid(shape)} for a tensor of {shape}"
            )
        if dtypes[scale] not in _SCALE_DTYPES:
            raise ConversionError(f"{scale!r} is of type {dtypes[scale]}, expected one of {_SCALE_DTYPES}")

    def names(self) -> Sequence[str]:
        """As the source's, without scales."""
        return list(self._shapes)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As the source's, without scales."""
        return self._shapes

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Of what ``get`` returns."""
        return self._dtypes

    def get(self, name: str) -> Tensor:
        """One full tensor. Raises ConversionError for an unknown name and for scales that are not finite."""
        return self.get_rows(name, 0, self._shape(name)[0]) if name in self._quantised else self._plain(name)

    def get_slice(self, name: str, index: int) -> Tensor:
        """One entry of dimension 0, read without the rest. Raises ConversionError as ``get``."""
        return self.get_rows(name, index, index + 1)[0]

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of dimension 0, read without the rest. Raises ConversionError as ``get``."""
        shape = self._shape(name)
        stored = self._source.get_rows(name, start, stop)
        if name not in self._quantised:
            return stored
        # Of a matrix, the first row may lie within a block; entries of fused experts are whole matrices.
        first, last = (start, stop) if len(shape) > 2 else (start // self._block.rows, -(-stop // self._block.rows))
        skipped = 0 if len(shape) > 2 else start % self._block.rows
        scales = self._source.get_rows(name + SCALE_SUFFIX, first, last)
        if not bool(torch.isfinite(scales).all()):
            raise ConversionError(f"{name + SCALE_SUFFIX!r} holds numbers that are not finite; copy the folder again")
        made = torch.empty(stored.shape, dtype=self._dtype)
        parts = (one if one.dim() > 2 else one[None] for one in (made, stored, scales))
        for target, matrix, grid in zip(*parts, strict=True):
            self._fill(target, matrix, grid.float(), skipped)
        return made

    def _fill(self, target: Tensor, matrix: Tensor, grid: Tensor, skipped: int) -> None:
        """``matrix`` times its blocks' factors, a row of blocks at a time. It lacks the first ``skipped`` rows."""
        for number, factors in enumerate(grid):
            start = max(0, number * self._block.rows - skipped)
            stop = (number + 1) * self._block.rows - skipped
            wide = factors.repeat_interleave(self._block.columns)[: matrix.shape[-1]]
            target[start:stop] = matrix[start:stop].float() * wide

    def _plain(self, name: str) -> Tensor:
        self._shape(name)
        return self._source.get(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise ConversionError(f"the folder holds no tensor {name!r}")
        return self._shapes[name]
