"""Does a source of tensors hold exactly the weights of a model?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.errors import ConversionError


def check_names(mappings: Sequence[WeightMapping], source: TensorSource, *, where: Path | None = None) -> None:
    """Raise ConversionError unless ``source`` holds every mapped tensor, in its shape, and nothing else.

    The message begins with ``where`` the tensors lie and names the first offender with its nearest neighbour on the
    other side. A tensor that repeats another (a tied ``lm_head.weight``) may be absent; where it is present it must be
    equal, or it would be lost silently.
    """
    at = "" if where is None else f"{where}: "
    wanted = {name for mapping in mappings for name in mapping.hf_names}
    aliases = {m.optional_alias: m.hf_names[0] for m in mappings if m.optional_alias is not None}
    held = set(source.names())
    missing, unknown = wanted - held, held - wanted - aliases.keys()
    if missing:
        raise ConversionError(
            f"{at}{len(missing)} weights of the model are missing, first "
            + _with_neighbour(min(missing), unknown or held)
        )
    if unknown:
        raise ConversionError(
            f"{at}{len(unknown)} tensors are not weights of the model, first {_with_neighbour(min(unknown), wanted)}"
        )
    shapes = source.shapes()
    for mapping in mappings:
        expected = mapping.hf_shapes or tuple(shapes[name] for name in mapping.hf_names)
        for name, shape in zip(mapping.hf_names, expected, strict=True):
            if shapes[name] != shape:
                raise ConversionError(f"{at}{name!r} has shape {shapes[name]}, but the model's config makes it {shape}")
    for alias, name in sorted(aliases.items()):
        if alias in held and not _same_bits(source.get(alias), source.get(name)):
            raise ConversionError(
                f"{at}{alias!r} differs from {name!r}, but the config says they are tied; set tie_word_embeddings to "
                "false"
            )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in dtype, shape and every bit: zeros of either sign differ, and a NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _with_neighbour(name: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(others), n=1)
    return f"{name!r}" + (f" (nearest here: {near[0]!r})" if near else "")
