"""What an alignment run cannot have served is refused before a server is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_megatron.config.align import AlignConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.conversion.checkpoint_folder import STATE_FILE
from prism_megatron.errors import ConfigError, RolloutError
from prism_megatron.stages.serving import build_served_rollout


@pytest.fixture
def one_rank_of_two_hosts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    return SimpleNamespace(rank=0, world_size=16, is_main=True)


def test_a_checkpoint_is_no_folder_to_serve(tmp_path: Path, one_rank_of_two_hosts: Any) -> None:
    (tmp_path / STATE_FILE).write_text("{}")
    renderer: Any = None
    with pytest.raises(ConfigError, match="is a checkpoint; make a folder of it"):
        build_served_rollout(AlignConfig(), tmp_path, renderer, world=one_rank_of_two_hosts, dtype=torch.float32)


def test_servers_are_not_started_for_ranks_that_cannot_reach_them(
    tmp_path: Path, one_rank_of_two_hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AlignConfig(checkpoint=CheckpointConfig(output=tmp_path))
    renderer: Any = None
    monkeypatch.setattr("prism_megatron.stages.serving.broadcast_object", lambda value, source: value)  # noqa: ARG005
    with pytest.raises(RolloutError, match="the run spans several; start servers yourself"):
        build_served_rollout(config, tmp_path, renderer, world=one_rank_of_two_hosts, dtype=torch.float32)
