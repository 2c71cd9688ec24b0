"""Claim: it makes no difference to the game who samples, the embedded engine or SGLang servers.

256 answers of each to the same scenes of the mini world. The servers are also given the embedded engine's answers to
score: tolerance 1e-4 nats for any token. The discriminator's mean scores are held to two standard errors of their
difference, which chance alone exceeds about once in twenty runs of independent answers; answers to the same scenes vary
less. Blind to weights other than the mini's and to bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World as Ranks
from prism_megatron.game.judge import score
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.testing import GlooWorld
from prism_megatron.training.roles import batch_format
from prism_megatron.types import TOWERS, Prompt, Rollout, RolloutGroup
from tests.mini_players import judge_plan, mini_discriminator
from tests.sglang.conftest import FOLDER, World
from tests.unit.rollout.weights import mini_weights

TOLERANCE = 1e-4
SCENES, SAMPLES = 16, 16
SAMPLING = Sampling(max_new_tokens=200)


def served_logprobs(world: World, prompt: Prompt, rollout: Rollout) -> torch.Tensor:
    """The server's log-probs of tokens that it did not draw."""
    request = world.engine._format.request(prompt, 1, SAMPLING)
    request["input_ids"] = [[*request["input_ids"][0], *rollout.token_ids]]
    request["sampling_params"] = {"max_new_tokens": 1}
    request["logprob_start_len"] = len(prompt.token_ids) - 1
    (answer,) = world.servers.servers[0].client.post("/generate", request)
    entries = answer["meta_info"]["input_token_logprobs"][-len(rollout.token_ids) :]
    last = Qwen3VLShape.from_folder(FOLDER).text.vocab - 1  # it scores this id, and reports it as 0
    assert [entry[1] for entry in entries] == [token if token < last else 0 for token in rollout.token_ids]
    return torch.tensor([entry[0] for entry in entries])


def mean_scores(world: Ranks, sets: Sequence[Sequence[RolloutGroup]]) -> list[tuple[float, float, int]]:
    """Of each set: mean score over valid answers and both towers, its standard error, and how many were valid."""
    renderer = Renderer.from_folder(FOLDER)
    discriminator = mini_discriminator(world)
    found = []
    for groups in sets:
        plan = judge_plan(batch_format(renderer, world), tokens=4096, seed=0)
        judgement = score(discriminator, groups, plan, world=world, step=0)
        scores = torch.tensor(
            [
                sum(judgement.scores[g, tower, r] for tower in TOWERS) / len(TOWERS)
                for g, group in enumerate(groups)
                for r, rollout in enumerate(group.rollouts)
                if rollout.segments.valid
            ]
        )
        found.append((float(scores.mean()), float(scores.std()) / math.sqrt(len(scores)), len(scores)))
    return found


@pytest.mark.slow
def test_neither_log_probs_nor_scores_tell_who_sampled(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    weights = dict(mini_weights())
    world.engine.update_weights(iter(weights.items()), 1)
    embedded = EmbeddedRollout(
        FOLDER,
        world.renderer.segment_finder,
        end_token_ids=[world.renderer.end_token_id],
        device=torch.device("cpu"),
    )
    embedded.update_weights(iter(weights.items()), 1)
    examples = SceneSource(world.renderer, split="align", seed=7, batch_size=SCENES).batch(0)
    prompts = [example.prompt for example in examples]
    sets = [
        engine.generate(SampleRequest(prompts, SAMPLES, SAMPLING, seed=3, step=0))
        for engine in (embedded, world.engine)
    ]
    gap = max(
        float((served_logprobs(world, prompt, rollout) - torch.tensor(rollout.logprobs)).abs().max())
        for prompt, group in zip(prompts, sets[0], strict=True)
        for rollout in group
    )
    groups = [
        [RolloutGroup(e.prompt, e.reference, rollouts) for e, rollouts in zip(examples, drawn, strict=True)]
        for drawn in sets
    ]
    with GlooWorld(2, timeout_s=500.0) as gloo:
        ours, theirs = gloo.run(mean_scores, groups)[0]
    with capsys.disabled():
        print(f"\nlargest difference of log-probs {gap:.2e}; mean scores (standard error, valid answers):")
        for name, (mean, error, valid) in (("embedded", ours), ("sglang", theirs)):
            print(f"{name:>9} {mean:8.4f} ({error:.4f}, {valid})")
    assert 0.0 < gap <= TOLERANCE
    assert min(ours[2], theirs[2]) > SCENES * SAMPLES / 2, "blind: too few answers are valid"
    assert abs(ours[0] - theirs[0]) <= 2 * math.hypot(ours[1], theirs[1])
