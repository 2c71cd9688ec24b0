"""Servers on two hosts: each host's first rank starts and supervises its own, and all ranks use all.

Two addresses of one host, 127.0.0.1 and 127.0.0.2, stand for two hosts of one rank each. Servers are stubs that speak
SGLang's protocol, in processes of their own; ranks, collectives, supervision and HTTP are real. Blind to networks that
lie between hosts, for which ``tests/sglang/test_two_hosts.py`` has namespaces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prism_megatron.commands.align import parse
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError, RolloutError
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.sampling import started_servers
from prism_megatron.sampling.hosts import Host
from prism_megatron.sampling.servers import build_served_rollout
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.testing import GlooWorld
from prism_megatron.types import Prompt
from tests.unit.rollout.fake_sglang import FOLDER
from tests.unit.rollout.served_fake import fake_python
from tests.unit.rollout.weight_servers import announced
from tests.waiting import wait_for

HOSTS = ("127.0.0.1", "127.0.0.2")


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(2, timeout_s=180.0) as gloo:
        yield gloo


def address_here(host: Host, _interface: str | None) -> str:
    return HOSTS[host.number]


def build(world: World, output: Path, *flags: str) -> SharedRollout:
    """What a run builds on each of two hosts of one rank."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    vars(started_servers)["address_of"] = address_here
    config = parse(["--rollout", "sglang", "--output", str(output), "--prompts-per-step", "2", *flags])
    shape, renderer = Qwen3VLShape.from_folder(FOLDER), Renderer.from_folder(FOLDER)
    return build_served_rollout(config.rollout, config.data, FOLDER, shape, renderer, output=output, world=world,
                                dtype=torch.float32)  # fmt: skip


def ask(shared: SharedRollout, name: str, count: int = 4) -> set[int]:
    """Versions of so many answers of this rank."""
    prompts = [Prompt(f"{name}-{i}", (5, 6, 7), (), "") for i in range(count)]
    groups = shared.generate(SampleRequest(prompts, 1, Sampling(max_new_tokens=4), seed=0, step=0))
    return {rollout.policy_version for (rollout,) in groups}


def asked_of(client: ServerClient) -> int:
    """How many answers the server has given since it was started."""
    return int(client.get("/server_info")["num_generated"])


def play(world: World, output: Path, python: str) -> dict[str, Any]:
    """Start, hand over, sample; kill each host's server in turn; then what each held and when."""
    shared = build(world, output, "--rollout-python", python, "--rollout-servers", "1")
    engine = shared._engine
    told: dict[str, Any] = {"urls": [client.url for client in engine._clients]}
    shared.update_weights(announced(2.0), 1)
    told["first"] = ask(shared, "first")
    own = engine._servers
    assert own is not None
    (server,) = own.servers
    (other,) = [client for client in engine._clients if client.url != server.url]
    told["asked"] = asked_of(server.client), server.url
    dist.barrier()
    for victim in (0, 1):
        before = server.pid
        if world.rank == victim:
            server.kill()
            server.kill()  # a second word changes nothing
        dist.barrier()
        told[f"while {victim}"] = ask(shared, f"while {victim}")
        shared.update_weights(announced(3.0 + victim), 2 + victim)
        told[f"after {victim}"] = ask(shared, f"after {victim}")
        clients = (server.client, other)
        wait_for(partial(all_at, clients, 2 + victim))
        wait_for(lambda: world.rank > 0 or not engine.out)  # whoever restores the server is done with it
        told[f"checksums {victim}"] = {checksum(client) for client in clients}
        told[f"restarted {victim}"] = server.pid != before
        dist.barrier()
    shared.close()
    return told


def all_at(clients: Sequence[ServerClient], version: int) -> bool:
    try:
        held = {client.get_once("/model_info")["weight_version"] for client in clients}
    except RolloutError:
        return False
    return held == {str(version)}


def checksum(client: ServerClient) -> str:
    return str(client.post_again("/weights_checker", {"action": "checksum"})["per_engine_checksum"])


def test_each_host_starts_kills_and_takes_back_its_own(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: ranks ask their own host's server first and the other while it is gone; a killed one is restarted by its
    own host and holds, whichever host it is of, bit for bit what the other one does."""
    first, second = gloo.run(play, tmp_path / "run", str(fake_python(tmp_path)))
    assert sorted(first["urls"]) == sorted(second["urls"]) and len(first["urls"]) == 2
    assert [url.split(":")[1].strip("/") for _, url in (first["asked"], second["asked"])] == list(HOSTS)
    assert [count for count, _ in (first["asked"], second["asked"])] == [4, 4], "each rank asked its own host"
    for rank, told in enumerate((first, second)):
        assert told["first"] == {1}
        for victim in (0, 1):
            assert told[f"while {victim}"] == {1 + victim} and told[f"after {victim}"] == {2 + victim}
            assert len(told[f"checksums {victim}"]) == 1
            assert told[f"restarted {victim}"] == (rank == victim)
    logs = tmp_path / "run" / "rollout"
    assert [path.name for path in sorted(logs.glob("host-*"))] == ["host-0", "host-1"]
    assert "is back, with version" in (logs / "servers.log").read_text(), "of the host that the main rank is not on"


def start_with_one_broken(world: World, output: Path, python: str) -> tuple[str, int]:
    """What a rank is told where the second host's server does not start, and how many servers it has left."""
    missing = output / "no-python"
    try:
        build(world, output, "--rollout-python", python if world.rank == 0 else str(missing))
    except PrismError as error:
        return f"{type(error).__name__} {error}", len(running_servers(output))
    return "", -1


def running_servers(output: Path) -> list[Path]:
    """Processes that were started with a file of arguments below ``output``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(output / "rollout") in path.read_text(errors="replace"):
                found.append(path)
        except OSError:
            continue  # it ended meanwhile
    return found


def test_a_host_that_cannot_start_its_servers_is_told_everywhere(gloo: GlooWorld, tmp_path: Path) -> None:
    output = tmp_path / "run"
    told = gloo.run(start_with_one_broken, output, str(fake_python(tmp_path)))
    assert len({message for message, _ in told}) == 1
    message = told[0][0]
    assert message.startswith("RolloutError on host 1 (127.0.0.2): ") and "set up SGLang's own environment" in message
    wait_for(lambda: not running_servers(output))


def give_up(world: World, output: Path, python: str) -> str:
    """What a rank hears whose own server lives, and the other host's dies and is not restarted."""
    shared = build(world, output, "--rollout-python", python, "--rollout-restarts-per-hour", "0")
    shared.update_weights(announced(2.0), 1)
    engine = shared._engine
    assert engine._servers is not None
    (server,) = engine._servers.servers
    dist.barrier()
    if world.rank == 1:
        server.kill()
    message = ""

    def is_told() -> bool:
        nonlocal message
        try:
            for client in engine._clients:
                engine._keeper.comes_back(client.url)
        except RolloutError as error:
            message = str(error)
        return bool(message)

    wait_for(is_told)
    dist.barrier()
    shared.close()
    return message


def test_who_restarts_no_more_is_heard_of_on_every_host(gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: no rank waits out its time for a server whose supervisor, on another host, has given up."""
    for message in gloo.run(give_up, tmp_path / "run", str(fake_python(tmp_path))):
        assert "server 0 died, and servers were restarted 0 times within an hour" in message and "host-1" in message
