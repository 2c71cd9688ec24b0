"""What an alignment run cannot have served is refused before a server is started; and which GPUs servers take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_megatron.config.align import AlignConfig
from prism_megatron.config.cli import parse
from prism_megatron.config.mini_world import MINI_FOLDER
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.errors import ConfigError, RolloutError
from prism_megatron.sampling import servers
from prism_megatron.sampling.servers import SharedRollout, build_served_rollout, first_server_gpu

POLICY = MINI_FOLDER / "policy"
MINI = Qwen3VLShape.from_folder(POLICY)


@pytest.fixture
def one_rank_of_two_hosts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    return SimpleNamespace(rank=0, world_size=16, is_main=True)


def test_servers_are_not_started_for_ranks_that_cannot_reach_them(
    tmp_path: Path, one_rank_of_two_hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AlignConfig()
    nothing: Any = None
    monkeypatch.setattr(servers, "broadcast_object", lambda value, source: value)  # noqa: ARG005
    with pytest.raises(RolloutError, match="the run spans several; start servers yourself"):
        build_served_rollout(config.rollout, config.data, POLICY, MINI, nothing, output=tmp_path,
                             world=one_rank_of_two_hosts, dtype=torch.float32)  # fmt: skip


@pytest.mark.parametrize("flag", ["--rollout-colocated", "--rollout-memory-fraction 0.4"])
def test_what_only_gpus_can_do_is_refused_before_anything_starts(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = parse(["--rollout", "sglang", *flag.split(), "--output", str(tmp_path)])
    nothing: Any = None
    with pytest.raises(ConfigError, match=f"{flag.split(maxsplit=1)[0]} needs CUDA, which this machine does not have"):
        build_served_rollout(config.rollout, config.data, tmp_path, nothing, nothing, output=tmp_path, world=nothing,
                             dtype=torch.float32)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "ranks", "num_gpus", "first"),
    [
        ("--rollout-servers 2 --rollout-tp 2", 4, 8, 4),
        ("--rollout-servers 4", 4, 8, 4),
        ("--rollout-servers 2 --rollout-tp 4 --rollout-colocated", 8, 8, 0),
    ],
)
def test_servers_take_the_gpus_behind_the_trainers_or_share_them(
    flags: str, ranks: int, num_gpus: int, first: int
) -> None:
    config = parse(["--rollout", "sglang", *flags.split()])
    assert first_server_gpu(config.rollout, ranks=ranks, num_gpus=num_gpus) == first
    with pytest.raises(ConfigError, match=f"take {num_gpus} GPUs, and this host has {num_gpus - 1}"):
        first_server_gpu(config.rollout, ranks=ranks, num_gpus=num_gpus - 1)


def test_a_run_that_stops_early_closes_its_servers_twice(tmp_path: Path) -> None:
    """The queue of rollouts ahead closes what still draws, and the run's end all there is."""
    exported = tmp_path / "model"
    exported.mkdir()
    engine: Any = SimpleNamespace(close=lambda: None)
    world: Any = SimpleNamespace(is_main=True)
    shared = SharedRollout(engine, world, exported=exported)
    shared.close()
    assert not exported.exists()
    shared.close()
