"""Which ranks of a world hold an embedded rollout replica, whether it fits there, and what the others do."""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from model_providers.qwen3_vl.mapping import weight_mappings
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.hf.files import read_object
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError, WeightSyncError
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.rollout.base import RolloutEngine, SampleRequest
from prism_megatron.rollout.embedded import ROWS_PER_BATCH, EmbeddedRollout
from prism_megatron.types import Rollout

EVERY_RANK_BELOW = 10**9
"""Bytes of weights up to which every rank holds a replica by default; a larger model has one on each node."""


class NoReplica:
    """The RolloutEngine of a rank that samples nothing: it takes part in gathering the weights and keeps none."""

    expert_layout: ExpertLayout = EmbeddedRollout.expert_layout

    @property
    def policy_version(self) -> int | None:
        """None: there are no weights here."""
        return None

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Let every tensor pass, since gathering them is collective."""
        del version
        deque(tensors, maxlen=0)

    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Raises WeightSyncError."""
        del request
        raise WeightSyncError("this rank holds no rollout replica; sample on those of --rollout-embedded-ranks")

    def sleep(self) -> None:
        """Nothing to release."""

    def wake(self) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class ReplicaPlan:
    """``ranks`` hold a replica each, of ``weight_bytes`` and, while it decodes, at most ``store_bytes``."""

    ranks: tuple[int, ...]
    weight_bytes: int
    store_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.store_bytes


def plan_replicas(
    sizes: RolloutConfig,
    data: DataConfig,
    shape: Qwen3VLShape,
    *,
    dtype: torch.dtype,
    world_size: int,
    ranks_per_node: int,
) -> ReplicaPlan:
    """Replicas spread evenly over the ranks. Raises ConfigError for more of them than ranks."""
    mappings = weight_mappings(shape, "per_expert")  # in which each name stands once
    elements = sum(math.prod(size) for mapping in mappings for size in mapping.hf_shapes or ())
    weight_bytes = elements * dtype.itemsize
    wanted = sizes.rollout_embedded_ranks
    if wanted is None:
        wanted = world_size if weight_bytes < EVERY_RANK_BELOW else max(1, world_size // ranks_per_node)
    if wanted > world_size:
        raise ConfigError(f"--rollout-embedded-ranks {wanted} is more than the {world_size} ranks of the run")
    ranks = tuple(i * world_size // wanted for i in range(wanted))
    return ReplicaPlan(ranks, weight_bytes, _store_bytes(sizes, data, shape, num_replicas=wanted))


def _store_bytes(sizes: RolloutConfig, data: DataConfig, shape: Qwen3VLShape, *, num_replicas: int) -> int:
    """Keys and values (float32, and a one beside each value) of the largest decode batch; prompts are held once."""
    n, text = sizes.rollouts_per_prompt, shape.text
    pairs = -(-sizes.prompts_per_step * n // num_replicas)
    rows = min(pairs, max(ROWS_PER_BATCH, n))
    prompts = min(sizes.prompts_per_step, -(-rows // n) + 1)
    positions = prompts * data.max_prompt_tokens + rows * data.max_response_tokens
    return positions * text.num_layers * text.kv_heads * (2 * text.head_dim + 1) * torch.float32.itemsize


def check_fits(plan: ReplicaPlan, available: Sequence[int], *, ranks_per_node: int, shares_memory: bool) -> None:
    """Raise ConfigError where the replicas need more than the bytes ``available`` to their ranks, by rank.

    ``shares_memory``: the ranks of a node have one memory, as without GPUs.
    """
    on_node = Counter(rank // ranks_per_node for rank in plan.ranks)
    for rank in plan.ranks:
        count = on_node[rank // ranks_per_node] if shares_memory else 1
        if plan.num_bytes * count > available[rank]:
            raise ConfigError(
                f"an embedded rollout replica takes {_gb(plan.weight_bytes)} of weights and up to "
                f"{_gb(plan.store_bytes)} of keys and values; {count} of them take {_gb(plan.num_bytes * count)}, and "
                f"rank {rank} has {_gb(available[rank])} available: lower --rollout-embedded-ranks "
                f"{len(plan.ranks)}, --max-response-tokens or --rollouts-per-prompt"
            )


def build_replicas(
    sizes: RolloutConfig,
    data: DataConfig,
    folder: Path,
    shape: Qwen3VLShape,
    renderer: Renderer,
    *,
    world: World,
    dtype: torch.dtype,
) -> RolloutEngine:
    """This rank's replica, or a ``NoReplica``; they have no weights until the policy's first hand-over.

    All ranks call it together. Raises ConfigError, on every rank, where the replicas do not fit.
    """
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    plan = plan_replicas(sizes, data, shape, dtype=dtype, world_size=world.world_size, ranks_per_node=ranks_per_node)
    on_gpu = world.device.type == "cuda"
    mine = torch.cuda.mem_get_info(world.device)[0] if on_gpu else psutil.virtual_memory().available
    check_fits(plan, all_gather_objects(mine), ranks_per_node=ranks_per_node, shares_memory=not on_gpu)
    if world.rank not in plan.ranks:
        return NoReplica()
    return build_replica(folder, renderer, world=world, dtype=dtype)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 10**9:.3g} GB"


def build_replica(
    folder: Path, renderer: Renderer, *, world: World, dtype: torch.dtype, rows_per_batch: int = ROWS_PER_BATCH
) -> EmbeddedRollout:
    """A replica on every rank; it has no weights until the policy's first hand-over."""
    return EmbeddedRollout(
        folder,
        renderer.segment_finder,
        end_token_ids=end_token_ids(folder, renderer),
        rows_per_batch=rows_per_batch,
        device=world.device,
        dtype=dtype,
    )


def end_token_ids(folder: Path, renderer: Renderer) -> list[int]:
    """What ends a response: the end token of turns, and those that the folder's ``generation_config.json`` adds.

    SGLang ends with the latter on its own. A response is valid only with the former. Raises ConversionError for a file
    that is no JSON object, ConfigError for ends that are no token ids.
    """
    path = folder / "generation_config.json"
    named = read_object(path).get("eos_token_id") if path.is_file() else None
    also = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token_id) is int and token_id >= 0 for token_id in also):
        raise ConfigError(f"{path}: eos_token_id is {named!r}; give a token id or a list of them, or remove it")
    return sorted({renderer.end_token_id, *also})
