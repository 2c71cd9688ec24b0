"""Claim: what real servers sample, our Megatron policy at TP2·PP2 gives the same log-probs, before and after updates.

Oracle: the policy itself, teacher-forced over what was sampled; in fp32 on both sides. Tolerance 1e-4 nats on the
largest difference of any token: text, one image, two images of different sizes, the same images after every update.
Blind to CUDA kernels and to bf16.
"""

from __future__ import annotations

from pathlib import Path

import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.sglang.weights import Transport
from prism_megatron.testing import GlooWorld
from tests.distributed.objective_ranks import scores_of_the_mini
from tests.sglang.conftest import FOLDER, World
from tests.sglang.policy_ranks import Served, as_groups, train_on_servers
from tests.unit.rollout.weights import mini_weights

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


def test_old_log_probs_are_what_the_servers_drew_with(world: World) -> None:
    """Claim: at TP2·PP2·CP2, packed in several micro-batches, values of single tokens are the servers' log-probs."""
    world.engine.update_weights(mini_weights(), 1)
    prompts = world.prompts()
    drawn = world.engine.generate(SampleRequest(prompts, 8, Sampling(max_new_tokens=48), seed=0, step=0))
    groups = as_groups(prompts, drawn)
    with GlooWorld(8, timeout_s=500.0) as gloo:
        results = gloo.run(scores_of_the_mini, groups, 400, parallel=ParallelConfig(tp=2, pp=2, cp=2))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    worst = 0.0
    for found, num_batches in results:
        assert num_batches > 1
        for own, rollout in zip(found, rollouts, strict=True):
            difference = torch.tensor(own.logprobs) - torch.tensor(rollout.logprobs)
            worst = max(worst, float(difference.abs().max()))
    print(f"{len(rollouts)} answers: log-probs differ by {worst:.1e} at most")
    assert 0.0 < worst <= TOLERANCE
