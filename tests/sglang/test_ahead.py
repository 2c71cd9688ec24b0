"""Real servers that generate while the policy is updated: every token is drawn by the version that it is said to be of.

Oracle: transformers with the weights of each version, in fp32 on both sides. Tolerance 1e-4 nats. Blind to CUDA kernels
and to servers that hold several GPUs.
"""

from __future__ import annotations

import threading
import time

import torch

from prism_megatron.rollout.base import Sampling
from prism_megatron.types import Rollout
from tests.sglang.conftest import World
from tests.sglang.test_real_server import TOLERANCE, hand_over, moved
from tests.unit.rollout.oracle import forced_logprobs

FLAGS = "--rollout sglang --rollout-ahead 1 --dtype fp32 --prompts-per-step 2 --rollouts-per-prompt 4 --policy.lr 1e-3"
STEPS = 4


def test_unfinished_answers_go_on_under_the_new_weights(world: World) -> None:
    """Text and images, the keys and values of the old weights gone: log-probs after an update are the new policy's."""
    weights = {version: moved(version) for version in (21, 22, 23)}
    hand_over(world, weights[21], 21)
    prompts, sampling = world.prompts() * 2, Sampling(temperature=2.0, max_new_tokens=400)
    collected: list[list[tuple[Rollout, ...]]] = []
    thread = threading.Thread(
        target=lambda: collected.append(world.engine.generate(prompts, 4, sampling, seed=0, step=0))
    )
    thread.start()
    for version in (22, 23):
        time.sleep(1.0)
        world.engine.update_weights(iter(weights[version].items()), version)
    thread.join()
    (groups,) = collected
    for prompt, group in zip(prompts, groups, strict=True):
        assert len(group) == 4
        assert any(len(rollout.versions) > 1 for rollout in group), f"blind: no answer to {prompt.id} was under way"
        for version in weights:
            world.load(weights[version])
            for rollout in group:
                expected = forced_logprobs(world.oracle, prompt, rollout, sampling.temperature)
                gap = (torch.tensor(rollout.logprobs).double() - expected).abs()
                of_version = torch.tensor(rollout.token_versions()) == version
                assert not of_version.any() or float(gap[of_version].max()) <= TOLERANCE, (prompt.id, rollout.versions)
