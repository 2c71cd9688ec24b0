"""Claim: what real servers sample, our Megatron policy at TP2·PP2 gives the same log-probs, before and after updates.

Oracle: the policy itself, teacher-forced over what was sampled; in fp32 on both sides. Tolerance 1e-4 nats on the
largest difference of any token: text, one image, two images of different sizes, the same images after every update.
Blind to CUDA kernels and to bf16.
"""

from __future__ import annotations

from pathlib import Path

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.rollout.sglang_weights import Transport
from prism_megatron.testing import GlooWorld
from tests.sglang.conftest import FOLDER, World
from tests.sglang.policy_ranks import Served, train_on_servers

TOLERANCE = 1e-4
TRANSPORTS: tuple[Transport, ...] = ("tensor", "disk", "group")


def test_the_policy_agrees_with_its_servers_after_every_update(world: World, tmp_path: Path) -> None:
    """Each path twice: the second time with weights that the steps in between have moved, over the same images."""
    with GlooWorld(4, timeout_s=500.0) as gloo:
        first, *_ = gloo.run(
            train_on_servers,
            Served(FOLDER, world.servers.urls, world.servers.api_key, tmp_path),
            world.prompts(),
            TRANSPORTS * 2,
            parallel=ParallelConfig(tp=2, pp=2),
        )
    for transport, gaps in zip(TRANSPORTS * 2, first, strict=True):
        assert max(gaps) <= TOLERANCE, (transport, gaps)
        assert min(gaps) > 0.0, "blind: nothing was compared"
