"""What a world tells of itself, and how long its groups wait."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine import runtime
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.errors import LostRankError


def test_every_group_waits_as_long_as_was_asked() -> None:
    """Claim: --distributed-timeout-minutes holds for the groups that Megatron makes too, whose default is another."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not mark its re-exports
    world = start(ParallelConfig(distributed_timeout_minutes=7), seed=1, rank=0, world_size=1, store=store)
    try:
        groups: tuple[Any, ...] = (
            dist.group.WORLD,
            world.groups.tp,
            world.groups.pp,
            world.groups.cp,
            world.groups.dp_cp,
        )
        waits = [group._get_backend(world.device).options._timeout for group in groups]
        assert waits == [timedelta(minutes=7)] * len(groups)
    finally:
        stop(world)


def test_a_rank_that_never_comes_is_one_error_that_says_how_long_it_was_waited_for() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not mark its re-exports
    seconds = timedelta(seconds=0.3)
    with pytest.raises(LostRankError, match=r"rank 0 of 2 could not meet the others \(.*\), .* 0.005 min") as caught:
        start(ParallelConfig(tp=2), seed=1, rank=0, world_size=2, store=store, timeout=seconds)
    assert caught.value.speaker is None, "who is there is not known"
    assert not dist.is_initialized()


class AskedError(Exception):
    """Ends a start where the world would begin."""


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_rank_is_bound_to_its_gpu_from_the_start(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: torch is told the device of the rank on its host, and nothing where there is none. The arguments bind to
    torch's own signature. Blind to NCCL."""
    asked: dict[str, Any] = {}
    signature = inspect.signature(dist.init_process_group)

    def init(*arguments: Any, **keywords: Any) -> None:
        asked.update(signature.bind(*arguments, **keywords).arguments)
        raise AskedError

    chosen: list[torch.device] = []
    monkeypatch.setattr(runtime, "open_cpu_door", lambda: on_cpu)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(AskedError):
        start(ParallelConfig(), seed=1, rank=11, world_size=16, store=dist.HashStore())  # type: ignore[attr-defined]
    assert (asked["backend"], asked["rank"], asked["world_size"]) == ("gloo" if on_cpu else "nccl", 11, 16)
    if on_cpu:
        assert asked["device_id"] is None and not chosen
    else:
        assert asked["device_id"] == torch.device("cuda", 3) and chosen == [asked["device_id"]]


def test_rounds_are_whole_for_every_rank() -> None:
    """Claim: three data-parallel ranks run alike, each whole rounds of pp where stages are interleaved."""
    for parallel, rounds in ((ParallelConfig(pp=4), 3), (ParallelConfig(pp=4, vpp=2), 12)):
        world = World(
            rank=0,
            world_size=12,
            device=torch.device("cpu"),
            parallel=parallel,
            groups=ProcessGroupCollection(),
            tp_rank=0,
            cp_rank=0,
            pp_rank=0,
            dp_rank=0,
            dp_size=3,
            layout={},
        )
        assert world.microbatch_rounds == rounds
