"""The world a process belongs to: process groups, its place in each, and the seeds."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed.distributed_c10d import Store

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.host.cpu import open_cpu_door
from prism_megatron.engine.host.determinism import be_deterministic
from prism_megatron.engine.launch import loopback_variables
from prism_megatron.errors import ConfigError, LostRankError
from prism_megatron.parallel.layout import expert_groups
from prism_megatron.parallel.lost_connection import lost_connection
from prism_megatron.parallel.object_groups import close_object_groups, open_object_groups

_UNUSED_GROUPS = frozenset({"hcp", "inter_dist_opt", "dp_cp_ag", "expt_dp_ag"})
"""Made only for hierarchical context parallelism, several optimizer instances, and overlapped FSDP all-gathers."""

_EXPERT_GROUPS = {
    "ep": "ep",
    "expt_tp": "etp",
    "tp_ep": "etp_ep",
    "tp_ep_pp": "etp_ep_pp",
    "tp_ep_pp_with_egtp_remat": "etp_ep_pp",
    "expt_dp": "edp",
    "expt_dp_gtp_remat": "edp",
    "intra_expt_dp": "edp",
}
"""Megatron's names of the groups that depend on how experts are split, and which of ``layout.ExpertGroups`` they are.
Weights of experts are not made anew per use (gtp_remat), and there is one instance of the optimizer (intra)."""

_END_STAGE_GROUPS = frozenset({"embd", "pos_embd"})
"""Megatron gives these to the stages that share an embedding, and None to the stages between."""


@dataclass(frozen=True, eq=False)
class World:
    """One process's place in the run. ``layout`` is what reports print: tp, pp, cp, dp, ep."""

    rank: int
    world_size: int
    device: torch.device
    parallel: ParallelConfig
    groups: ProcessGroupCollection
    tp_rank: int
    cp_rank: int
    pp_rank: int
    dp_rank: int
    dp_size: int
    layout: Mapping[str, int]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.parallel.pp - 1

    @property
    def gradient_ranks(self) -> int:
        """Ranks over which gradients are summed: those of experts, or of the rest, whichever are more."""
        sizes: tuple[int, int] = (self.groups.dp_cp.size(), self.groups.expt_dp.size())
        return max(sizes)

    @property
    def microbatch_rounds(self) -> int:
        """The number of micro-batches of all data-parallel ranks together must be a multiple of this.

        Every rank runs as many as the others, because expert parallelism exchanges tokens between them, and Megatron's
        interleaved schedule takes whole rounds of pp.
        """
        return self.dp_size * self.parallel.microbatches_of_a_rank


def start(
    parallel: ParallelConfig,
    *,
    seed: int,
    rank: int | None = None,
    world_size: int | None = None,
    store: Store | None = None,
    timeout: timedelta | None = None,
) -> World:
    """Join the world and build the groups of ``parallel``.

    Rank, size and rendezvous come from torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); a process
    without one is a world of one. ``store`` with ``rank`` and ``world_size`` is a rendezvous made by the caller.
    The backend is NCCL where CUDA is present and gloo elsewhere; objects travel over gloo. ``timeout`` replaces
    ``parallel``'s own.
    Raises ConfigError when the world does not fit ``parallel``, or the environment ``--deterministic``; LostRankError
    where the ranks do not all meet.
    """
    if parallel.deterministic:
        be_deterministic()
    on_cpu = open_cpu_door()
    timeout = timeout or timedelta(minutes=parallel.distributed_timeout_minutes)
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    if world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"--tp {parallel.tp} --cp {parallel.cp} --pp {parallel.pp} needs a multiple of "
            f"{parallel.model_parallel_size} processes, "
            f"but {world_size} were started"
        )
    if on_cpu:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if store is None and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not mark its re-exports
        os.environ.update(loopback_variables())
    backend = "gloo" if on_cpu else "nccl"
    # Bound to its GPU, a rank makes NCCL's communicator here, and other groups' by splitting it: what cannot work fails
    # now, and not in the first collective.
    device_id = None if on_cpu else device
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )
        open_object_groups(parallel, timeout)
        return divide(parallel, seed=seed, device=device, timeout=timeout)
    except RuntimeError as error:
        if (said := lost_connection(error)) is None:
            raise
        raise LostRankError(
            f"rank {rank} of {world_size} could not meet the others ({said}), for whom it waits "
            f"{timeout.total_seconds() / 60:g} min (--distributed-timeout-minutes); see what the other hosts say, and "
            "start all of them anew",
            speaker=None,
        ) from error


def divide(parallel: ParallelConfig, *, seed: int, device: torch.device, timeout: timedelta) -> World:
    """Build the groups of ``parallel`` in a world that this process has joined, and say where it stands in each."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.expert_tp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    groups = _complete_groups()
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return World(
        rank=rank,
        world_size=world_size,
        device=device,
        parallel=parallel,
        groups=groups,
        tp_rank=groups.tp.rank(),
        cp_rank=groups.cp.rank(),
        pp_rank=groups.pp.rank(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        layout={
            "tp": parallel.tp,
            "pp": parallel.pp,
            "cp": parallel.cp,
            "dp": groups.dp.size(),
            "ep": parallel.ep,
            "etp": parallel.expert_tp,
        },
    )


def with_experts(world: World, parallel: ParallelConfig) -> World:
    """The same ranks for a model whose experts are split as ``parallel`` says, which otherwise is the world's own.

    Where it splits them otherwise than the world's, their groups are made here, by all ranks together.
    """
    assert replace(parallel, ep=world.parallel.ep, etp=world.parallel.etp) == world.parallel, "only experts may differ"
    if (parallel.ep, parallel.expert_tp) == (world.parallel.ep, world.parallel.expert_tp):
        return world
    of_each = [
        expert_groups(rank, world_size=world.world_size, parallel=parallel)._asdict()
        for rank in range(world.world_size)
    ]
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    made = {
        axes: dist.new_subgroups_by_enumeration(
            [list(ranks) for ranks in sorted({groups[axes] for groups in of_each})], timeout=timeout
        )[0]
        for axes in of_each[0]
    }
    groups = copy.copy(world.groups)
    for name, axes in _EXPERT_GROUPS.items():
        if hasattr(groups, name):
            setattr(groups, name, made[axes])
    layout = {**world.layout, "ep": parallel.ep, "etp": parallel.expert_tp}
    return replace(world, parallel=parallel, groups=groups, layout=layout)


def stop(world: World) -> None:
    """Leave the world: every process group is destroyed, so that a new one can be started.

    Engines stand in reference cycles, and what they hold of a gloo group keeps its threads running: both are collected
    here, for a process that goes from world to world would slow down with every one.
    """
    if world.parallel.deterministic:
        torch.use_deterministic_algorithms(False)
    del world
    close_object_groups()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()


def _complete_groups() -> ProcessGroupCollection:
    """The one collection that is passed everywhere.

    megatron-core 0.19.2 answers None for a group nobody set, so ``hasattr`` proves nothing and a forgotten group would
    pass silently as 'not parallel': every field is checked here, once.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    required = {field.name for field in fields(ProcessGroupCollection)} - _UNUSED_GROUPS
    if not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        required -= _END_STAGE_GROUPS
    missing = sorted(name for name in required if getattr(groups, name, None) is None)
    if missing:
        raise RuntimeError(f"megatron-core built no process group for {', '.join(missing)}")
    return groups
