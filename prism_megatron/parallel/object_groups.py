"""Groups over which Python objects travel: gloo's, whatever carries the ranks' tensors.

torch pickles an object into a tensor on the device of its group. With NCCL that is a copy to the GPU, a collective
behind the kernels under way there, and a wait for all of them, for a few bytes that no kernel needs.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.parallel.layout import place_of

_opened: dict[tuple[int, ...], dist.ProcessGroup] = {}
"""By their ranks."""


def open_object_groups(parallel: ParallelConfig, timeout: timedelta) -> None:
    """Make those of the world, of this rank's pipeline and of its data-parallel ranks; all ranks call it together.

    It must come before any other group is made: torch names a group that its members alone make by its ranks and the
    number of groups in the process, which later is not the same in all.
    """
    size = dist.get_world_size()
    places = [place_of(rank, world_size=size, parallel=parallel) for rank in range(size)]
    mine = places[dist.get_rank()]
    pipeline = [rank for rank, place in enumerate(places) if place._replace(pp_rank=mine.pp_rank) == mine]
    copies = [rank for rank, place in enumerate(places) if place._replace(dp_rank=mine.dp_rank) == mine]
    for ranks in (list(range(size)), pipeline, copies):
        if len(ranks) > 1 and tuple(ranks) not in _opened:
            # By its members alone: where a device is bound to the world, torch has ranks that are no members of a group
            # take part in a split of NCCL's communicator, in which members of a gloo group do not.
            _opened[tuple(ranks)] = dist.new_group(
                ranks, backend="gloo", timeout=timeout, use_local_synchronization=True, group_desc="objects"
            )


def close_object_groups() -> None:
    """Destroy them; every rank does, before its world."""
    for group in _opened.values():
        dist.destroy_process_group(group)
    _opened.clear()


def object_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The one with the ranks of ``group``, or of the world for None.

    AssertionError for a group of another backend than gloo that has none.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None, "the world has not been started"
    found = _opened.get(tuple(dist.get_process_group_ranks(group)))
    assert found is not None or dist.get_backend(group) == "gloo", "no objects travel over this group; open one for it"
    return group if found is None else found
