"""Checkpoints: every role of a run in one folder, committed by one rename, readable in any other layout.

See ``conversion/checkpoints/folder.py`` for what a folder is made of. Each rank writes and reads its own part
(``engine/pieces.py``), block by block, where its tensors are: on the device or put away. Tensors and names are those of
Megatron's fully reshardable form, so 0.16.1 and 0.19.2 read each other's, and Megatron itself reads them.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from prism_megatron.conversion.boxes import intersection
from prism_megatron.conversion.checkpoints.folder import (
    ModelFiles,
    companions_folder,
    read_checkpoint,
    write_state,
)
from prism_megatron.conversion.checkpoints.torch_dist import TorchDistFolder
from prism_megatron.conversion.ops import Box
from prism_megatron.disk import check_room, writing
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.export import WeightTable
from prism_megatron.engine.pieces import Piece
from prism_megatron.engine.saving import REPLACED, SAVING, Saving, Writing
from prism_megatron.errors import CheckpointError, ConversionError
from prism_megatron.parallel.collectives import all_gather_objects, broadcast_object, on_main


def save(
    folder: Path,
    engines: Mapping[str, MegatronEngine],
    state: Mapping[str, Any],
    *,
    models: Mapping[str, ModelFiles],
) -> None:
    """Write ``engines`` and the JSON-able ``state`` to ``folder``, all ranks together: ``begin``, then ``finish``."""
    begin(folder, engines, state, models=models, aside=False).finish()


def begin(
    folder: Path,
    engines: Mapping[str, MegatronEngine],
    state: Mapping[str, Any],
    *,
    models: Mapping[str, ModelFiles],
    aside: bool,
) -> Saving:
    """Begin to write ``engines`` and the JSON-able ``state``, on all ranks together; ``models`` on rank 0 counts.

    ``models`` holds the Hugging Face files of each role, so that the folder needs no other to be used or converted.
    Everything is written and flushed to a hidden sibling first; one rename, in ``Saving.finish``, makes it the
    checkpoint, so a save that is killed leaves what was there before. Its leftovers are removed by the next save. Only
    a save over the same step takes two renames, and a kill between them loses that step (not older ones).

    ``aside`` copies this rank's part to host memory, which is as much again as it writes, and returns: training may go
    on. Otherwise all tensors are written on return, with one block of at most 64 MiB in host memory at a time (a single
    row may be larger). What is offloaded stays so. At most one may be under way.
    Raises DiskError, on every rank, before a byte is written where the disk has no room.
    """
    hidden = folder.with_name(f".{folder.name}{SAVING}")
    pieces = [piece for engine in engines.values() for piece in engine.pieces() if piece.is_written]
    needed = sum(all_gather_objects(sum(piece.tensor.nbytes for piece in pieces)))
    on_main(lambda: _make_room(hidden, folder, needed))
    # What stands beside the tensors is that of now as well, whatever the steps beside the writing make of it.
    progress = {name: engine.progress() for name, engine in engines.items()}
    kept = {
        role: {"expert_layout": engines[role].expert_layout, "aliases": sorted(model.aliases)}
        for role, model in models.items()
    }
    now, files = copy.deepcopy(dict(state)), dict(models)

    def describe() -> None:
        for role, model in files.items():
            model.write(companions_folder(hidden, role))
        write_state(hidden, engines=progress, models=kept, state=now)

    own = Writing(hidden / f"__{dist.get_rank()}_0.distcp", pieces, aside=aside)
    return Saving(folder, hidden, own, describe)


def _make_room(hidden: Path, folder: Path, needed: int) -> None:
    """Remove what killed saves left, and make ``hidden`` for ``needed`` bytes of tensors."""
    with writing(hidden):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.parent.glob(f".*{SAVING}"), *folder.parent.glob(f".*{REPLACED}")]:
            shutil.rmtree(leftover)
        check_room(folder.parent, needed, what=str(folder))
        hidden.mkdir()


def load(folder: Path, engines: Mapping[str, MegatronEngine]) -> dict[str, Any]:
    """Restore ``engines`` from ``folder``, on all ranks together, and return the ``state`` saved with them.

    The layout may differ from the saved one. Raises CheckpointError, on every rank, when the folder is incomplete,
    lacks an engine, does not fit it, or its pickled index names anything but tensor metadata.
    """
    opened = _open(folder, {role: engine.weights for role, engine in engines.items()})
    for role, engine in engines.items():
        _fill(engine.pieces(), opened)
        engine.resume(opened.document["engines"][role])
        _take_layout(engine, opened, role)
    state: dict[str, Any] = opened.document["state"]
    return state


def load_weights(folder: Path, engine: MegatronEngine, role: str) -> None:
    """Take the weights of ``role`` and nothing else, cast to the engine's dtype; masters follow, moments stay.

    ``folder`` is a checkpoint of training in any layout, or a converted one. On all ranks together. Raises
    CheckpointError as ``load``.
    """
    opened = _open(folder, {role: engine.weights})
    _fill(engine.pieces(role, with_state=False), opened)
    engine.take_weights()
    _take_layout(engine, opened, role)


def _take_layout(engine: MegatronEngine, opened: TorchDistFolder, role: str) -> None:
    """An export returns to the layout of experts that the weights once came in."""
    if role in opened.document["models"]:
        engine.expert_layout = opened.document["models"][role]["expert_layout"]


def _fill(pieces: Iterable[Piece], opened: TorchDistFolder) -> None:
    """Read this rank's pieces, one at a time. Raises what one rank meets on all of them, when all have read."""
    problem: CheckpointError | None = None
    pieces = list(pieces)
    try:
        held = frozenset(opened.keys())
        for piece in pieces:  # all are looked for before anything changes
            _check_fit(piece, opened, held)
        for piece in pieces:
            _read_into(piece, opened)
    except (CheckpointError, ConversionError) as error:  # the latter from a file that ends too early
        problem = error if isinstance(error, CheckpointError) else CheckpointError(str(error))
    found = next((one for one in all_gather_objects(problem) if one is not None), None)
    if found is not None:
        raise found


def _check_fit(piece: Piece, opened: TorchDistFolder, held: frozenset[str]) -> None:
    key, reason = piece.key, ""
    if key not in held:
        reason = f"{key} is not in it"
    elif (stored := opened.shape(key)) != piece.shape:
        # Other layouts pad the vocabulary, the first dimension, to other lengths.
        same_rest = piece.may_differ and stored[1:] == piece.shape[1:]
        reason = "" if same_rest else f"{key} has the shape {stored} there, {piece.shape} here"
    if reason:
        raise CheckpointError(
            f"{opened.folder} does not fit this model or optimizer ({reason}); "
            "load it with the model and the distributed-optimizer setting it was saved with"
        )


def _read_into(piece: Piece, opened: TorchDistFolder) -> None:
    """Numbers that the checkpoint has, and zeros for the padding that it lacks."""
    shape = opened.shape(piece.key)
    common = intersection(piece.box, Box((0,) * len(shape), shape))
    rows = 0 if common is None else common.size[0]
    if common is not None:
        piece.tensor.narrow(0, 0, rows).copy_(opened.read_box(piece.key, common))
    if rows < piece.box.size[0]:
        piece.tensor.narrow(0, rows, piece.box.size[0] - rows).zero_()


def _open(folder: Path, weights: Mapping[str, WeightTable]) -> TorchDistFolder:
    """``folder`` after all checks; rank 0 reads its index, every rank gets the answer or the error."""
    answer: tuple[tuple[dict[str, Any], Metadata] | None, str] | None = None
    if dist.get_rank() == 0:
        try:
            answer = _checked(folder, weights), ""
        except CheckpointError as error:
            answer = None, str(error)
    found, problem = broadcast_object(answer, source=0)
    if found is None:
        raise CheckpointError(problem)
    return TorchDistFolder(folder, found)


def _checked(folder: Path, weights: Mapping[str, WeightTable]) -> tuple[dict[str, Any], Metadata]:
    """Vocabularies are fitted to each other, whichever is longer; words that a checkpoint lacks would be zeros."""
    document, index = read_checkpoint(folder)
    if missing := sorted(weights.keys() - document["engines"].keys()):
        raise CheckpointError(f"{folder} holds {sorted(document['engines'])}, not {', '.join(missing)}")
    for role, table in weights.items():
        for parameter, words in table.vocabularies().items():
            held = index.state_dict_metadata.get(f"{role}.{parameter}")
            if isinstance(held, TensorStorageMetadata) and held.size[0] < words:
                raise CheckpointError(
                    f"{folder} has {held.size[0]} rows of {role}.{parameter}, fewer than the model's {words} words; "
                    "load it with the model it was saved with"
                )
    return document, index
