"""A micro-batch as every rank of a model-parallel group holds it.

Shape suffixes: B rows, S tokens (padded), Q sequences, N images, L tokens of this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prism_megatron.engine.runtime import World
from prism_megatron.engine.vision.images import SharedImages
from prism_megatron.parallel.host_to_device import on_device
from prism_megatron.parallel.layout import zigzag
from prism_megatron.types import ImageInput, TokenSequence


class Extra(StrEnum):
    """What a batch may carry for a loss, by name: the one home of the keys of ``Batch.extras``."""

    LABEL_MASK = "label_mask"
    """[B, S] 1 on tokens that are learnt from; token extras stand at the position of the label"""
    IMAGE_MASK = "image_mask"
    """[B, S] the same, for prompts with images only"""
    ON_POLICY_MASK = "on_policy_mask"
    """[B, S] the same, for tokens that the policy drew which trains on them"""
    ADVANTAGES = "advantages"
    """[B, S] what a token is worth"""
    ROLLOUT_LOGPROBS = "rollout_logprobs"
    """[B, S] as the rollout engine drew the tokens"""
    OLD_LOGPROBS = "old_logprobs"
    """[B, S] of the policy before the first update on these rollouts"""
    REFERENCE_LOGPROBS = "reference_logprobs"
    """[B, S] of the frozen policy that this one is held near to"""
    CORRECTION = "correction"
    """[B, S] importance weights of the tokens; 0 on one that is left out"""
    KEPT_TOKENS = "kept_tokens"
    """[Q] label tokens of a sequence that are not left out"""
    SOURCE = "source"
    """[B, S] number of the set that a demonstration comes from"""
    REFERENCE_ROW = "reference_row"
    """[Q] place of the reference that a sequence is compared with"""
    IS_ROLLOUT = "is_rollout"
    """[Q] 1 for rollouts, 0 for references and prompts"""
    KNOWN_SCORES = "known_scores"
    """[parts] scores of references that were scored in another pass"""
    KNOWN_DROPPED = "known_dropped"
    """[parts] the same with dropout"""
    SCORE_SLOPE = "score_slope"
    """[Q] what the step's loss changes by with a sequence's score"""
    DROPOUT_KEY = "dropout_key"
    """[Q] what the head's dropout mask is drawn from"""
    SEQUENCE_SHARE = "sequence_share"
    """[Q] what a sequence counts in a router's means over the step: for a discriminator its share of its segment's
    sequences, for a policy its share of the tokens"""
    LEARNT_TOKENS = "learnt_tokens"
    """[Q] a sequence's tokens, where it has a label; 0 for those that fill up"""
    LOAD_BALANCE_WEIGHT = "load_balance_weight"
    """[Q] that times the coefficient of the load-balancing loss"""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences with their images: one to a row, or (``packed``) one after the other in a single row.

    Example: ``collate([TokenSequence((5, 6, 7)), TokenSequence((8,))], pad_token_id=0, multiple_of=4, device=cpu,
    pack=True)`` is one row of eight tokens with slots of four; ``lengths`` are 3 and 1.

    A sequence fills a *slot* that ends in padding; padding is never read. Every slot of an unpacked batch is S long.
    ``images_by_sequence[q]`` lists, in order of appearance, which of the N images sequence q shows: sequences that show
    the same image name the same index, and the vision tower runs once for it. ``extras`` holds what a loss needs:
    per-token tensors ``[B, S]`` or per-sequence tensors ``[Q]``. ``host_ids_B_S`` repeats the ids in host memory, and
    ``host_extras`` what :func:`collate` was given, so that nothing has to wait for a device to find the images (which
    stay there until a vision tower reads them), or to count labels.
    ``prefixes[q]`` names an earlier sequence of a packed row that sequence q goes on from: its tokens see all of that
    one's too and are counted from its end, as if both stood there in one piece. Several may share a prefix.
    """

    input_ids_B_S: Tensor
    host_ids_B_S: npt.NDArray[np.int64]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    packed: bool
    images: tuple[ImageInput, ...]
    images_by_sequence: tuple[tuple[int, ...], ...]
    prefixes: tuple[int | None, ...] = ()
    tower_ids_Q: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    host_extras: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    shared_images: SharedImages = field(default_factory=SharedImages)

    @property
    def grid_thw_N_3(self) -> Tensor:  # noqa: N802 # the suffix is its shape
        """Frames, rows and columns of patches of every image, in host memory."""
        return torch.tensor([image.grid_thw for image in self.images], dtype=torch.int64).reshape(-1, 3)

    @property
    def lengths_Q(self) -> Tensor:  # noqa: N802 # the suffix is its shape
        """Real tokens of each sequence, on the batch's device."""
        return on_device(np.array(self.lengths, dtype=np.int64), self.input_ids_B_S.device)

    def row_slots(self) -> tuple[int, ...]:
        """Slots that lie one after the other in each row; they add up to S."""
        return self.slots if self.packed else self.slots[:1]

    def places(self) -> list[tuple[int, int]]:
        """Row and first token of each sequence's slot."""
        if not self.packed:
            return [(row, 0) for row in range(len(self.slots))]
        starts = np.cumsum((0, *self.slots[:-1]))
        return [(0, int(start)) for start in starts]

    def row_prefixes(self) -> tuple[tuple[int, int], ...]:
        """First token and length of what each slot of ``row_slots`` goes on from; empty where none does."""
        if not any(prefix is not None for prefix in self.prefixes):
            return ()
        places = self.places()
        return tuple((0, 0) if p is None else (places[p][1], self.lengths[p]) for p in self.prefixes)

    def stretches(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Pairs (slot, sequence) ``[P], [P]``: each sequence's own slot, and the one of its prefix.

        A prefix is no sequence of its own here.
        """
        prefixes = self.prefixes or (None,) * len(self.slots)
        prompts = set(prefixes) - {None}
        pairs = [(q, q) for q in range(len(self.slots)) if q not in prompts]
        pairs += [(prefix, q) for q, prefix in enumerate(prefixes) if prefix is not None]
        slot_P, sequence_P = np.array(pairs, dtype=np.int64).T
        return slot_P, sequence_P

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
    shifted_B_S[:, on_device(ends, shifted_B_S.device)] = 0
    if world.parallel.cp == 1:
        return shifted_B_S
    tokens_L = batch.tokens_of(cp_size=world.parallel.cp, cp_rank=world.cp_rank)
    return shifted_B_S.index_select(1, on_device(tokens_L, shifted_B_S.device))


def label_places(batch: Batch, world: World) -> Tensor:
    """``[N]``: which of this context-parallel rank's logits predict a label token, counted in ``[L, B]``.

    Known from host memory, so that nobody waits for the device to learn how many there are.
    """
    labels_B_S = batch.host_extras[Extra.LABEL_MASK] != 0
    tokens_L = batch.tokens_of(cp_size=world.parallel.cp, cp_rank=world.cp_rank)
    has_next_L = ~np.isin(tokens_L, np.cumsum(batch.row_slots()) - 1)
    chosen_L_B = np.zeros((len(tokens_L), len(labels_B_S)), dtype=np.bool_)
    chosen_L_B[has_next_L] = labels_B_S[:, tokens_L[has_next_L] + 1].T
    return on_device(np.flatnonzero(chosen_L_B), batch.input_ids_B_S.device)


def away_from_logits(values_B_L: Tensor, batch: Batch, world: World) -> Tensor:
    """The inverse of :func:`beside_logits`: ``[B, S]`` with 0 where this context-parallel rank knows nothing.

    What stands beside the last token of a slot belongs to no token, and is dropped.
    """
    tokens_L = batch.tokens_of(cp_size=world.parallel.cp, cp_rank=world.cp_rank)
    has_next_L = ~np.isin(tokens_L, np.cumsum(batch.row_slots()) - 1)
    values_B_S = values_B_L.new_zeros(batch.input_ids_B_S.shape)
    here_L = on_device(np.flatnonzero(has_next_L), values_B_L.device)
    labels_L = on_device(tokens_L[has_next_L] + 1, values_B_L.device)
    return values_B_S.index_copy(1, labels_L, values_B_L.index_select(1, here_L))


def sequences_beside_logits(batch: Batch, world: World) -> Tensor:
    """``[B, L]``: the number of the sequence that each output of this context-parallel rank predicts a token of."""
    tokens_L = batch.tokens_of(cp_size=world.parallel.cp, cp_rank=world.cp_rank)
    slot_L_B, _ = token_sequences(batch, tokens_L)
    return on_device(slot_L_B.T, batch.input_ids_B_S.device)


def token_sequences(
    batch: Batch, tokens_L: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """In which sequence's slot each of a row's tokens ``tokens_L`` lies, and whether it is real; both ``[L, B]``."""
    row_Q, start_Q = np.array(batch.places()).T
    num_rows = len(batch.input_ids_B_S)
    slot_L_B = np.empty((len(tokens_L), num_rows), dtype=np.int64)
    for row in range(num_rows):
        here = np.flatnonzero(row_Q == row)
        slot_L_B[:, row] = here[np.searchsorted(start_Q[here], tokens_L, side="right") - 1]
    return slot_L_B, tokens_L[:, None] - start_Q[slot_L_B] < np.array(batch.lengths)[slot_L_B]


def collate(
    sequences: Sequence[TokenSequence],
    *,
    pad_token_id: int,
    multiple_of: int,
    device: torch.device,
    pack: bool = False,
    prefixes: Sequence[int | None] = (),
    tower_ids: Sequence[int] | None = None,
    token_extras: Mapping[str, Sequence[Sequence[float]]] | None = None,
    sequence_extras: Mapping[str, Sequence[float] | Sequence[int]] | None = None,
) -> Batch:
    """Pad sequences on the right to a multiple of ``multiple_of`` (``ParallelConfig.length_multiple``).

    Each becomes a row, all of the longest one's length; with ``pack`` they follow one another in a single row, each
    in a slot of its own length. ``token_extras`` are per-token float lists as long as their sequence; they are padded
    with 0. ``sequence_extras`` hold one number a sequence: ints become int64, floats float32.
    Images are deduplicated by object identity. ``prefixes`` (see ``Batch``) need ``pack``; a prefix stands before those
    that go on from it, and has none itself.
    Raises ValueError for rows and extras that do not fit each other.
    """
    assert not prefixes or pack
    for sequence, prefix in enumerate(prefixes):
        if prefix is not None and (prefix >= sequence or prefixes[prefix] is not None):
            raise ValueError(f"sequence {sequence} cannot go on from {prefix}, which is not an earlier one by itself")
    lengths = tuple(len(sequence.token_ids) for sequence in sequences)
    slots = tuple(-(-(length if pack else max(lengths)) // multiple_of) * multiple_of for length in lengths)

    shape = (1, sum(slots)) if pack else (len(slots), slots[0])
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    _place([sequence.token_ids for sequence in sequences], slots, input_ids)

    images, images_by_sequence = _distinct_images(sequences)
    host_extras: dict[str, npt.NDArray[Any]] = {}
    for name, values in (token_extras or {}).items():
        for of_sequence, length in zip(values, lengths, strict=True):
            if len(of_sequence) != length:
                raise ValueError(f"extra {name!r} has {len(of_sequence)} values for a sequence of {length} tokens")
        table = np.zeros(shape, dtype=np.float32)
        _place(values, slots, table)
        host_extras[name] = table
    for name, per_sequence in (sequence_extras or {}).items():
        whole = all(isinstance(value, int) for value in per_sequence)
        host_extras[name] = np.array(list(per_sequence), dtype=np.int64 if whole else np.float32)

    return Batch(
        input_ids_B_S=on_device(input_ids, device),
        host_ids_B_S=input_ids,
        lengths=lengths,
        slots=slots,
        packed=pack,
        images=tuple(images),
        images_by_sequence=images_by_sequence,
        prefixes=tuple(prefixes),
        tower_ids_Q=None if tower_ids is None else on_device(np.array(tower_ids, dtype=np.int64), device),
        extras={name: on_device(values, device) for name, values in host_extras.items()},
        host_extras=host_extras,
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
