"""Claim: a real server of a policy with experts takes them one by one, and samples from the policy that trains.

Oracles: the server's own checksum of what it read from a folder as it is published; the policy at TP2·EP2 in fp32,
teacher-forced over what was sampled. Tolerance 1e-4 nats on the largest difference of any token, over text, one image
and two images. Blind to CUDA's kernels for experts, to SGLang's tensor parallelism and to bf16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.data.render import Renderer
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.sglang.server import SGLangServers
from prism_megatron.rollout.sglang.weights import Transport
from prism_megatron.testing import GlooWorld
from tests.mini_experts import write_mini_with_experts
from tests.sglang.conftest import mini_options, some_prompts
from tests.sglang.policy_ranks import Served, train_on_servers

TOLERANCE = 1e-4
TRANSPORTS: tuple[Transport, ...] = ("tensor", "disk", "group")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_with_experts(tmp_path_factory.mktemp("policy") / "hub", "hub")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServers]:
    options = dataclasses.replace(mini_options(tmp_path_factory.mktemp("logs")), model=folder)
    servers = SGLangServers(options, count=1)
    servers.start()
    yield servers
    servers.stop()


def held_by(server: SGLangServers) -> str:
    client = ServerClient(server.urls[0], api_key=server.api_key)
    return str(client.post_again("/weights_checker", {"action": "checksum"})["per_engine_checksum"])


def test_experts_one_by_one_are_those_that_the_server_read_fused(
    server: SGLangServers, folder: Path, tmp_path: Path
) -> None:
    """By every way the same weights leave the checksum as it was, and twice those weights do not."""
    own = held_by(server)
    single = load_file(write_mini_with_experts(tmp_path / "single", "per_expert") / "model.safetensors")
    for version, transport in enumerate(TRANSPORTS):
        engine = SGLangRollout(
            folder,
            Renderer.from_folder(folder).segment_finder,
            urls=server.urls,
            api_key=server.api_key,
            end_token_ids=[Renderer.from_folder(folder).end_token_id],
            spool=tmp_path / transport,
            options=SGLangOptions(transport=transport, bucket_bytes=2**19),
        )
        experts = {name: 2.0 * tensor if ".experts." in name else tensor for name, tensor in single.items()}
        engine.update_weights(experts.items(), 2 * version)
        assert held_by(server) != own
        engine.update_weights(single.items(), 2 * version + 1)
        assert held_by(server) == own, transport
        engine.close()


def test_the_policy_agrees_with_its_server_after_every_update(
    server: SGLangServers, folder: Path, tmp_path: Path
) -> None:
    """Each way hands over weights that the steps in between have moved, over the same images."""
    with GlooWorld(2, timeout_s=500.0) as gloo:
        first, _ = gloo.run(
            train_on_servers,
            Served(folder, server.urls, server.api_key, tmp_path),
            some_prompts(Renderer.from_folder(folder)),
            TRANSPORTS,
            parallel=ParallelConfig(tp=2, ep=2),
        )
    for transport, gaps in zip(TRANSPORTS, first, strict=True):
        assert max(gaps) <= TOLERANCE, (transport, gaps)
        assert min(gaps) > 0.0, "blind: nothing was compared"
