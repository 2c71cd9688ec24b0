"""Folders whose fused expert tensors are transposed, presented in the layout of our mappings.

transformers 5 keeps ``[experts, output, input]`` and so do our mappings. transformers 4, and the folders published with
it, keep ``[experts, input, output]`` under the same names. Only the shape tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.errors import ConversionError

Shape = tuple[int, ...]


class TransposedExperts(TensorSource):
    """``source`` with the last two dimensions of the tensors ``names`` exchanged."""

    def __init__(self, source: TensorSource, names: frozenset[str]) -> None:
        self._source = source
        self._transposed = names

    def names(self) -> Sequence[str]:
        """As the source's."""
        return self._source.names()

    def shapes(self) -> Mapping[str, Shape]:
        """The shapes after the exchange."""
        return {
            name: _exchanged(shape) if name in self._transposed else shape
            for name, shape in self._source.shapes().items()
        }

    def get(self, name: str) -> Tensor:
        """One full tensor."""
        tensor = self._source.get(name)
        return tensor.transpose(-2, -1).contiguous() if name in self._transposed else tensor

    def get_slice(self, name: str, index: int) -> Tensor:
        """One expert; the source reads no more than that."""
        tensor = self._source.get_slice(name, index)
        return tensor.transpose(-2, -1).contiguous() if name in self._transposed else tensor


def with_experts_as_mapped(source: TensorSource, mappings: Sequence[WeightMapping]) -> TensorSource:
    """``source``, its fused experts transposed where the folder keeps them the other way round.

    Tensors of neither shape are left to ``verify.check_names``. Raises ConversionError where some tensors have one
    layout and some the other, and where the model's sizes make both layouts the same shape.
    """
    wanted = {
        name: shape
        for mapping in mappings
        if mapping.expert is not None
        for name, shape in zip(mapping.hf_names, mapping.hf_shapes or (), strict=True)
    }
    for name, shape in wanted.items():
        if shape == _exchanged(shape):
            raise ConversionError(
                f"{name!r} is {shape} in both known layouts of fused experts (its input is as wide as its output), so "
                "which one a folder holds cannot be told; models of such sizes are not supported"
            )
    held = source.shapes() if wanted else {}
    mapped = sorted(name for name, shape in wanted.items() if held.get(name) == shape)
    transposed = sorted(name for name, shape in wanted.items() if held.get(name) == _exchanged(shape))
    if mapped and transposed:
        raise ConversionError(
            f"fused experts are stored in two layouts: {mapped[0]!r} is {held[mapped[0]]} (experts, output, input) but "
            f"{transposed[0]!r} is {held[transposed[0]]} (experts, input, output); save the model again with one "
            "version of transformers"
        )
    return TransposedExperts(source, frozenset(transposed)) if transposed else source


def _exchanged(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])
