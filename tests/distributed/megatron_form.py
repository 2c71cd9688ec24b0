"""Checkpoints as Megatron itself writes them, and as versions of ours did that left the work to it: an oracle.

Its ``fully_reshardable`` form gathers masters and moments over data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from prism_megatron.conversion.checkpoints.folder import OBJECTS_FILE, ModelFiles, companions_folder, write_state
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.pieces import is_shard
from prism_megatron.parallel.collectives import on_main


class _InProcessSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]  # Megatron's has no types
    """Megatron's sharded save, written by the rank itself: upstream spawns a process that imports all of it again."""

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        sharded_state_dict.pop("common_state", None)  # 0.19.2's, an object
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        assert all(isinstance(shard, ShardedTensor) for shards in by_key.values() for shard in shards)
        save_tensors(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, thread_count=1),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )
        if dist.get_rank() == 0:
            torch.save({}, Path(checkpoint_dir) / OBJECTS_FILE)


def sharded_state(engine: MegatronEngine, *, is_loading: bool = False) -> dict[str, Any]:
    """Weights, masters and moments as Megatron's own sharded tensors."""
    engine._restore()
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": engine.world.groups.dp_cp,
    }
    model: dict[str, Any] = {}
    for module in engine.modules:
        model |= module.sharded_state_dict(prefix=f"{engine.name}.", metadata=metadata)
    state: dict[str, Any] = {"model": _shards_of(model)}
    if engine.optimizer is not None:
        optimizer = engine.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        state["optimizer"] = _shards_of(optimizer)
    return state


def save(
    folder: Path, engines: Mapping[str, MegatronEngine], state: Mapping[str, Any], models: Mapping[str, ModelFiles]
) -> None:
    """A checkpoint as ours were up to now. All ranks together."""
    shards = {name: sharded_state(engine) for name, engine in engines.items()}
    on_main(lambda: folder.mkdir(parents=True))
    dist_checkpointing.save(shards, str(folder), sharded_strategy=_InProcessSave("torch_dist", 1))

    def describe() -> None:
        for role, model in models.items():
            model.write(companions_folder(folder, role))
        write_state(
            folder,
            engines={name: engine.progress() for name, engine in engines.items()},
            models={role: {"expert_layout": engines[role].expert_layout, "aliases": []} for role in models},
            state=state,
        )

    on_main(describe)


def load_weights(engine: MegatronEngine, folder: Path) -> None:
    """Let Megatron's loader and the modules' own ``load_state_dict`` take the weights. All ranks together."""
    loaded = dist_checkpointing.load({engine.name: {"model": sharded_state(engine)["model"]}}, str(folder))
    weights = {key.removeprefix(f"{engine.name}."): value for key, value in loaded[engine.name]["model"].items()}
    for module in engine.modules:
        missing, _ = module.load_state_dict(weights, strict=False)
        assert not [key for key in missing if not key.endswith("_extra_state")], missing


def _shards_of(state: Any) -> Any:
    return extract_matching_values(state, is_shard, return_lists_as_dicts=True)[0]
