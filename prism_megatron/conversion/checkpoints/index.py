"""Does an index of tensors describe what lies in its folder, and nothing else?"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from prism_megatron.conversion.ops import Box
from prism_megatron.errors import CheckpointError

_MAX_CELLS = 10**7
"""More pieces than any layout cuts a tensor into; counting them would take an absurd index's memory."""


def check_index(index: Metadata, folder: Path) -> None:
    """Raise CheckpointError unless every tensor is covered by chunks whose bytes lie in data files of ``folder``.

    Every element lies in exactly one chunk. Nothing is read but the files' sizes.
    """
    try:
        problem = _problem(index, folder)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        problem = f"is malformed ({error!r})"
    if problem:
        raise CheckpointError(f"{folder / '.metadata'} {problem}; load another step")


def _problem(index: Metadata, folder: Path) -> str:
    if not isinstance(index.storage_meta, StorageMeta | None):
        return "is malformed (no storage_meta)"
    places: dict[tuple[str, tuple[int, ...]], int] = {}
    sizes: dict[str, int] = {}
    for where, info in index.storage_data.items():
        name = info.relative_path
        if name not in sizes:
            if PurePath(name).name != name or not name.endswith(".distcp"):
                return f"names {name!r}, which is not a data file of this folder"
            if not (folder / name).is_file():
                return f"names {name!r}, which is missing"
            sizes[name] = (folder / name).stat().st_size
        if getattr(info, "transform_descriptors", None):
            coded = reprlib.repr(info.transform_descriptors)
            return f"says that {where.fqn!r} is stored as {coded}, which is not supported"
        if not _are_counts(info.offset, info.length) or info.offset + info.length > sizes[name]:
            return (
                f"places {where.fqn!r} at bytes {info.offset} to {info.offset + info.length} of {name!r}, "
                f"which has {sizes[name]} (was it cut short?)"
            )
        places[_place(where)] = info.length
    for key, tensor in index.state_dict_metadata.items():
        if found := _tensor_problem(key, tensor, places):
            return f"{found} of {key!r}"
    return ""


def _tensor_problem(key: str, tensor: Any, places: dict[tuple[str, tuple[int, ...]], int]) -> str:
    if not isinstance(key, str) or not isinstance(tensor, TensorStorageMetadata):
        return "holds something else than a tensor in place"
    shape = tuple(tensor.size)
    if not _are_counts(*shape):
        return f"gives the shape {reprlib.repr(shape)}"
    boxes = []
    for chunk in tensor.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        if not _are_counts(*offsets, *sizes) or any(end > full for end, full in zip(ends, shape, strict=True)):
            return f"gives a chunk {reprlib.repr(sizes)} at {reprlib.repr(offsets)} to the shape {shape}"
        stored = places.get((key, offsets))
        if stored is None:
            return f"has no place for the chunk at {offsets}"
        if math.prod(sizes) * tensor.properties.dtype.itemsize > stored:
            return f"keeps {stored} bytes for a chunk {sizes} ({tensor.properties.dtype})"
        boxes.append(Box(offsets, sizes))
    return "" if _cover(shape, boxes) else f"has chunks that do not cover the shape {shape} exactly"


def _cover(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether every element of ``shape`` lies in exactly one box: counted on the grid that all their edges make."""
    edges = [
        sorted({0, n}.union(*((b.offset[d], b.offset[d] + b.size[d]) for b in boxes))) for d, n in enumerate(shape)
    ]
    if math.prod(len(cuts) - 1 for cuts in edges) > _MAX_CELLS:
        return False
    places = [{cut: place for place, cut in enumerate(cuts)} for cuts in edges]
    counts = np.zeros([len(cuts) - 1 for cuts in edges], dtype=np.int32)
    for box in boxes:
        counts[tuple(slice(at[o], at[o + s]) for at, o, s in zip(places, *box, strict=True))] += 1
    return bool((counts == 1).all())


def _place(where: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    if where.offset is None:
        raise ValueError(f"{where.fqn!r} is stored without its offset")
    return where.fqn, tuple(where.offset)


def _are_counts(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
