"""Checkpoints: every role of a run in one folder, committed by one rename, readable in any other layout.

See ``conversion/checkpoints/folder.py`` for what a folder is made of. Tensors are in the optimizer's fully reshardable
form; nothing is pickled but their index, so 0.16.1 and 0.19.2 read each other's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from prism_megatron.conversion.checkpoints.folder import (
    COMPANIONS_FOLDER,
    OBJECTS_FILE,
    ModelFiles,
    companions_folder,
    flush_folder,
    read_checkpoint,
    write_state,
)
from prism_megatron.disk import check_room, disk_error, writing
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.export import WeightTable
from prism_megatron.engine.host.compat import quiet_checkpointing
from prism_megatron.errors import CheckpointError, DiskError
from prism_megatron.parallel.collectives import all_gather_objects, broadcast_object, on_main

_SAVING = ".saving"
_REPLACED = ".replaced"


def save(
    folder: Path,
    engines: Mapping[str, MegatronEngine],
    state: Mapping[str, Any],
    *,
    models: Mapping[str, ModelFiles],
) -> None:
    """Write ``engines`` and the JSON-able ``state`` to ``folder``, on all ranks together; ``models`` on rank 0 counts.

    ``models`` holds the Hugging Face files of each role, so that the folder needs no other to be used or converted.
    Everything is written and flushed to a hidden sibling first; one rename makes it the checkpoint, so a save that is
    killed leaves what was there before. Its leftovers are removed by the next save. Only a save over the
    same step takes two renames, and a kill between them loses that step (not older ones).
    Raises DiskError, on every rank, before a byte is written where the disk has no room, and where it fills up.
    """
    hidden = folder.with_name(f".{folder.name}{_SAVING}")
    shards = {name: engine.sharded_state_dict(is_loading=False) for name, engine in engines.items()}
    needed = sum(all_gather_objects(_bytes_of(shards)))
    on_main(lambda: _make_room(hidden, folder, needed))
    try:
        with quiet_checkpointing():
            dist_checkpointing.save(shards, str(hidden), sharded_strategy=_InProcessSave("torch_dist", 1))
    except (CheckpointException, OSError) as error:  # torch's is no Exception: it carries what ranks raised, by rank
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise _not_written(hidden, first) from None
    for engine in engines.values():
        engine.release()

    def finish() -> None:
        with writing(folder):
            progress = {name: engine.progress() for name, engine in engines.items()}
            for role, model in models.items():
                model.write(companions_folder(hidden, role))
            kept = {
                role: {"expert_layout": engines[role].expert_layout, "aliases": sorted(model.aliases)}
                for role, model in models.items()
            }
            write_state(hidden, engines=progress, models=kept, state=state)
            _commit(hidden, folder)

    on_main(finish)


def _make_room(hidden: Path, folder: Path, needed: int) -> None:
    """Remove what killed saves left, and make ``hidden`` for ``needed`` bytes of tensors."""
    with writing(hidden):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.parent.glob(f".*{_SAVING}"), *folder.parent.glob(f".*{_REPLACED}")]:
            shutil.rmtree(leftover)
        check_room(folder.parent, needed, what=str(folder))
        hidden.mkdir()


def _bytes_of(shards: Any) -> int:
    """Bytes of tensors that this rank writes: of what several ranks hold, one copy."""
    return sum(
        shard.data.nbytes
        for shard in nested_values(shards)
        if isinstance(shard, ShardedTensor | ShardedTensorFactory)
        and shard.data is not None
        and is_main_replica(shard.replica_id)
    )


def _not_written(hidden: Path, error: BaseException) -> DiskError | CheckpointError:
    """What a failed save is called. Its leftovers go where that still works, so that there is room again."""
    known = disk_error(error, hidden)
    if dist.get_rank() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
    return known or CheckpointError(f"{hidden} cannot be written: {type(error).__name__}: {error}")


def load(folder: Path, engines: Mapping[str, MegatronEngine]) -> dict[str, Any]:
    """Restore ``engines`` from ``folder``, on all ranks together, and return the ``state`` saved with them.

    The layout may differ from the saved one. Raises CheckpointError, on every rank, when the folder is incomplete,
    lacks an engine, does not fit it, or its pickled index names anything but tensor metadata.
    """
    document = _read(folder, {role: engine.weights for role, engine in engines.items()})
    loaded = _read_tensors(
        folder, {role: engine.sharded_state_dict(is_loading=True) for role, engine in engines.items()}
    )
    for role, engine in engines.items():
        engine.load_sharded_state_dict(loaded[role], document["engines"][role])
        _take_layout(engine, document, role)
    state: dict[str, Any] = document["state"]
    return state


def load_weights(folder: Path, engine: MegatronEngine, role: str) -> None:
    """Take the weights of ``role`` and nothing else, cast to the engine's dtype; masters follow, moments stay.

    ``folder`` is a checkpoint of training in any layout, or a converted one. On all ranks together. Raises
    CheckpointError as ``load``.
    """
    document = _read(folder, {role: engine.weights})
    loaded = _read_tensors(folder, {role: {"model": engine.sharded_weights(role)}})
    engine.load_sharded_weights(loaded[role]["model"], role)
    _take_layout(engine, document, role)


def _take_layout(engine: MegatronEngine, document: Mapping[str, Any], role: str) -> None:
    """An export returns to the layout of experts that the weights once came in."""
    if role in document["models"]:
        engine.expert_layout = document["models"][role]["expert_layout"]


def _read_tensors(folder: Path, shards: dict[str, Any]) -> dict[str, Any]:
    """What ``folder`` holds for ``shards``, role by role, in their structure."""
    try:
        with quiet_checkpointing():
            loaded: dict[str, Any] = dist_checkpointing.load(shards, str(folder))
    except (CheckpointingException, KeyError) as error:
        raise _misfit(folder, error) from error
    except CheckpointException as error:  # torch's, no Exception: it carries what ranks raised, by rank
        raise _misfit(folder, next(iter(error.failures.values()))[0]) from None
    return loaded


def _misfit(folder: Path, error: BaseException) -> CheckpointError:
    reason = str(error)
    if isinstance(error, KeyError):  # Megatron's message goes on with every key there is
        reason = reason.strip("'\"").split(":", maxsplit=1)[0]
    elif not isinstance(error, CheckpointingException):
        return CheckpointError(
            f"a data file of {folder} is damaged, or holds more than a tensor: "
            f"{type(error).__name__}: {reason.splitlines()[0] if reason else 'no message'}; load another step"
        )
    return CheckpointError(
        f"{folder} does not fit this model or optimizer ({reason}); "
        "load it with the model and the distributed-optimizer setting it was saved with"
    )


class _InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's sharded save, written by the rank itself.

    Upstream (both versions) prepares for asynchronous saves: a manager process is spawned, which imports the main
    module again (29 s on 8 ranks), and 0.16.1 forks a writer each time. A synchronous save needs neither.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        # 0.19.2 puts its common state here as a pickled object; ours is empty and stands in common.pt, as in 0.16.1.
        sharded_state_dict.pop("common_state", None)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        assert all(isinstance(shard, ShardedTensor) for shards in by_key.values() for shard in shards)
        save_tensors(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True, thread_count=1),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )
        if dist.get_rank() == 0:
            torch.save({}, Path(checkpoint_dir) / OBJECTS_FILE)


def _commit(hidden: Path, folder: Path) -> None:
    """Make ``hidden`` the checkpoint ``folder`` by a rename; an older one of the same step steps aside first."""
    if (hidden / COMPANIONS_FOLDER).is_dir():
        flush_folder(hidden / COMPANIONS_FOLDER)
    flush_folder(hidden)
    replaced = folder.with_name(f".{folder.name}{_REPLACED}")
    if folder.exists():
        folder.rename(replaced)
    hidden.rename(folder)
    flush_folder(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _read(folder: Path, weights: Mapping[str, WeightTable]) -> dict[str, Any]:
    """``state.json`` after all checks; rank 0 reads, every rank gets the answer or the error."""
    answer: tuple[dict[str, Any], str] | None = None
    if dist.get_rank() == 0:
        try:
            answer = _checked(folder, weights), ""
        except CheckpointError as error:
            answer = {}, str(error)
    document, problem = broadcast_object(answer, source=0)
    if problem:
        raise CheckpointError(problem)
    return document


def _checked(folder: Path, weights: Mapping[str, WeightTable]) -> dict[str, Any]:
    """Megatron fits vocabularies to each other, whichever is longer; words that a checkpoint lacks would be zeros."""
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
    return document
