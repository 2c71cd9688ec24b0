"""A micro-batch as every rank of a model-parallel group holds it.

Shape suffixes: B rows, S tokens (padded), Q sequences, N images, L tokens of this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prism_megatron.engine.images import SharedImages
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.layout import zigzag
from prism_megatron.types import ImageInput, TokenSequence


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences with their images: one to a row, or (``packed``) one after the other in a single row.

    A sequence fills a *slot* that ends in padding; padding is never read. Every slot of an unpacked batch is S long.
    ``images_by_sequence[q]`` lists, in order of appearance, which of the N images sequence q shows: sequences that show
    the same image name the same index, and the vision tower runs once for it. ``extras`` holds what a loss needs:
    per-token tensors ``[B, S]`` or per-sequence tensors ``[Q]``. ``host_ids_B_S`` repeats the ids in host memory, so
    that nothing has to wait for a device to find the images, which stay there until a vision tower reads them.
    """

    input_ids_B_S: Tensor
    host_ids_B_S: npt.NDArray[np.int64]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    packed: bool
    images: tuple[ImageInput, ...]
    images_by_sequence: tuple[tuple[int, ...], ...]
    tower_ids_Q: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    shared_images: SharedImages = field(default_factory=SharedImages)

    @property
    def grid_thw_N_3(self) -> Tensor:  # noqa: N802 # the suffix is its shape
        """Frames, rows and columns of patches of every image, in host memory."""
        return torch.tensor([image.grid_thw for image in self.images], dtype=torch.int64).reshape(-1, 3)

    @property
    def lengths_Q(self) -> Tensor:  # noqa: N802 # the suffix is its shape
        """Real tokens of each sequence, on the batch's device."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.input_ids_B_S.device)

    def row_slots(self) -> tuple[int, ...]:
        """Slots that lie one after the other in each row; they add up to S."""
        return self.slots if self.packed else self.slots[:1]

    def places(self) -> list[tuple[int, int]]:
        """Row and first token of each sequence's slot."""
        if not self.packed:
            return [(row, 0) for row in range(len(self.slots))]
        starts = np.cumsum((0, *self.slots[:-1]))
        return [(0, int(start)) for start in starts]

    def tokens_of(self, *, cp_size: int, cp_rank: int) -> npt.NDArray[np.int64]:
        """Which of a row's S tokens a context-parallel rank holds (see ``parallel.layout.zigzag``); all rows alike."""
        return zigzag(self.row_slots(), cp_size=cp_size, cp_rank=cp_rank)


def beside_logits(values_B_S: Tensor, batch: Batch, world: World) -> Tensor:
    """Values that belong to label tokens, brought to the logits that predict them: ``[B, L]`` on this rank.

    ``out[b, i] = values[b, t + 1]`` where this context-parallel rank's output i is that of token t; 0 where t is the
    last token of its sequence's slot, whose successor, if any, belongs to another sequence.
    """
    shifted_B_S = torch.nn.functional.pad(values_B_S[:, 1:], (0, 1))
    ends = np.cumsum(batch.row_slots()) - 1
    shifted_B_S[:, torch.from_numpy(ends).to(shifted_B_S.device)] = 0
    if world.parallel.cp == 1:
        return shifted_B_S
    tokens_L = batch.tokens_of(cp_size=world.parallel.cp, cp_rank=world.cp_rank)
    return shifted_B_S.index_select(1, torch.from_numpy(tokens_L).to(shifted_B_S.device))


def collate(
    sequences: Sequence[TokenSequence],
    *,
    pad_token_id: int,
    multiple_of: int,
    device: torch.device,
    pack: bool = False,
    tower_ids: Sequence[int] | None = None,
    token_extras: Mapping[str, Sequence[Sequence[float]]] | None = None,
    sequence_extras: Mapping[str, Sequence[float] | Sequence[int]] | None = None,
) -> Batch:
    """Pad sequences on the right to a multiple of ``multiple_of`` (``ParallelConfig.length_multiple``).

    Each becomes a row, all of the longest one's length; with ``pack`` they follow one another in a single row, each
    in a slot of its own length. ``token_extras`` are per-token float lists as long as their sequence; they are padded
    with 0. ``sequence_extras`` hold one number a sequence: ints become int64, floats float32.
    Images are deduplicated by object identity.
    """
    lengths = tuple(len(sequence.token_ids) for sequence in sequences)
    slots = tuple(-(-(length if pack else max(lengths)) // multiple_of) * multiple_of for length in lengths)

    shape = (1, sum(slots)) if pack else (len(slots), slots[0])
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    _place([sequence.token_ids for sequence in sequences], slots, input_ids)

    images, images_by_sequence = _distinct_images(sequences)
    extras: dict[str, Tensor] = {}
    for name, values in (token_extras or {}).items():
        for of_sequence, length in zip(values, lengths, strict=True):
            if len(of_sequence) != length:
                raise ValueError(f"extra {name!r} has {len(of_sequence)} values for a sequence of {length} tokens")
        table = np.zeros(shape, dtype=np.float32)
        _place(values, slots, table)
        extras[name] = torch.from_numpy(table).to(device)
    for name, per_sequence in (sequence_extras or {}).items():
        extras[name] = torch.tensor(list(per_sequence), device=device)

    return Batch(
        input_ids_B_S=torch.from_numpy(input_ids).to(device),
        host_ids_B_S=input_ids,
        lengths=lengths,
        slots=slots,
        packed=pack,
        images=tuple(images),
        images_by_sequence=images_by_sequence,
        tower_ids_Q=None if tower_ids is None else torch.tensor(list(tower_ids), dtype=torch.int64, device=device),
        extras=extras,
    )


def _place(per_sequence: Sequence[Sequence[float]], slots: Sequence[int], table: npt.NDArray[Any]) -> None:
    """Write each sequence's values at the start of its slot, in ``[Q, S]`` or (packed) ``[1, S]``."""
    flat, start = table.reshape(-1), 0
    for values, slot in zip(per_sequence, slots, strict=True):
        flat[start : start + len(values)] = values
        start += slot


def _distinct_images(sequences: Sequence[TokenSequence]) -> tuple[list[ImageInput], tuple[tuple[int, ...], ...]]:
    """Every image object once, and for each sequence the numbers of those it shows."""
    images: list[ImageInput] = []
    index_of: dict[int, int] = {}
    for sequence in sequences:
        for image in sequence.images:
            if id(image) not in index_of:
                index_of[id(image)] = len(images)
                images.append(image)
    return images, tuple(tuple(index_of[id(image)] for image in sequence.images) for sequence in sequences)
