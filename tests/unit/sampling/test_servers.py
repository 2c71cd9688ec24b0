"""What an alignment run cannot have served is refused before a server is started; and which GPUs servers take."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from prism_megatron.commands.align import parse
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.data.render import Renderer
from prism_megatron.errors import ConfigError, RolloutError, WeightSyncError
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.sampling import servers, shared_rollout
from prism_megatron.sampling.servers import API_KEY, build_served_rollout, first_server_gpu
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.training.prompts import renderer_of
from prism_megatron.types import Prompt
from tests.unit.rollout.fake_sglang import KEY, running
from tests.unit.rollout.stub_sglang import stub_python

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


@pytest.mark.parametrize("flag", ["--rollout-colocated", "--rollout-memory-fraction 0.4", "--rollout-sync ipc"])
def test_what_only_gpus_can_do_is_refused_before_anything_starts(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = parse(["--rollout", "sglang", *flag.split(), "--output", str(tmp_path)])
    nothing: Any = None
    with pytest.raises(
        ConfigError, match=f"{flag.split(maxsplit=1)[0]}.* needs CUDA, which this machine does not have"
    ):
        build_served_rollout(config.rollout, config.data, tmp_path, nothing, nothing, output=tmp_path, world=nothing,
                             dtype=torch.float32)  # fmt: skip


def test_limits_of_pixels_beyond_the_servers_are_refused(tmp_path: Path) -> None:
    config = parse(["--rollout", "sglang", "--max-pixels", "20000", "--output", str(tmp_path)])
    renderer, nothing = renderer_of(POLICY, config.data), cast(Any, None)
    with pytest.raises(ConfigError, match="--max-pixels 20000 must be at most 16384 with --rollout sglang"):
        build_served_rollout(config.rollout, config.data, POLICY, MINI, renderer, output=tmp_path, world=nothing,
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


def test_servers_have_room_for_all_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts a step, two steps ahead: nine prompts over two servers are five on one of them, of four samples
    each. A context holds the longest prompt and response, and the few tokens that SGLang keeps."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    flags = "--prompts-per-step 3 --rollouts-per-prompt 4 --rollout-ahead 2 --rollout-servers 2"
    lengths = "--max-prompt-tokens 100 --max-response-tokens 50"
    config = parse(
        ["--rollout", "sglang", *flags.split(), *lengths.split(), "--rollout-python", str(stub_python(tmp_path))]
    )
    world: Any = SimpleNamespace(world_size=1)
    logs = tmp_path / "logs"
    servers._start(config.rollout, config.data, POLICY, world=world, dtype=torch.float16, logs=logs).stop()
    started = [json.loads((tmp_path / "logs" / f"server-{i}.yaml").read_text()) for i in range(2)]
    for arguments in started:
        assert arguments["max-running-requests"] == 20 and arguments["context-length"] == 166
        assert arguments["max-total-tokens"] == 20 * 166
        assert arguments["dtype"] == "float16" and arguments["model-path"] == str(POLICY.resolve())
    assert started[0]["port"] != started[1]["port"]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_with_one_request_each_ask_different_servers(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, KEY)
    for module in (servers, shared_rollout):
        monkeypatch.setattr(module, "broadcast_object", lambda value, source: value)  # noqa: ARG005
    world: Any = SimpleNamespace(rank=rank, world_size=3, is_main=False)
    with running(image_token_id=498) as one, running(image_token_id=498) as two:
        config = parse(["--rollout", "sglang", "--rollout-urls", one.url, two.url, "--output", str(tmp_path)])
        renderer = Renderer.from_folder(POLICY)
        shared = build_served_rollout(config.rollout, config.data, POLICY, MINI, renderer, output=tmp_path, world=world,
                                      dtype=torch.float32)  # fmt: skip
        one.version = two.version = "5"
        shared._engine.follow(5)
        shared._engine.generate(
            SampleRequest([Prompt("p", (5, 6), (), "")], 1, Sampling(max_new_tokens=4), seed=0, step=0)
        )
        shared.close()
        assert ["/generate" in fake.paths() for fake in (one, two)] == [rank % 2 == 0, rank % 2 == 1]


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


def test_after_a_failed_hand_over_every_rank_knows_what_the_servers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the version that the main rank found, not the one that was to be; all tensors are taken part in."""
    followed: list[int | None] = []
    engine: Any = SimpleNamespace(policy_version=None, expect=lambda _version: None, follow=followed.append)
    world: Any = SimpleNamespace(is_main=False)
    monkeypatch.setattr(shared_rollout, "all_gather_objects", lambda _value: None)
    monkeypatch.setattr(shared_rollout, "broadcast_object", lambda _value, source: ("a server died", 4))  # noqa: ARG005
    tensors = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    with pytest.raises(WeightSyncError, match="a server died"):
        SharedRollout(engine, world).update_weights(tensors, 5)
    assert followed == [4]
    assert next(tensors, None) is None


def test_ranks_let_go_of_memory_before_servers_on_their_devices_take_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Claim: twice: before weights come, and, since gathering them leaves memory behind, before keys and values do.
    All ranks have by then. Blind to the memory itself, which CUDA alone has."""
    events: list[str] = []

    def gathered(_value: object) -> None:
        events.append("all ranks are here")

    engine: Any = SimpleNamespace(
        policy_version=1,
        expect=lambda _version: None,
        update_weights=lambda tensors, _version: events.append(f"servers take {len(list(tensors))} weights"),
        wake=lambda: events.append("servers take the rest"),
    )
    monkeypatch.setattr(shared_rollout, "all_gather_objects", gathered)
    monkeypatch.setattr(shared_rollout, "broadcast_object", lambda value, source: value)  # noqa: ARG005
    world: Any = SimpleNamespace(is_main=True)
    shared = SharedRollout(engine, world, let_go=lambda: events.append("let go"))
    shared.update_weights([("a", torch.zeros(1))], 1)
    shared.wake()
    freed = ["let go", "all ranks are here"]
    assert events == [*freed, "servers take 1 weights", *freed, "servers take the rest"]
