"""What the ranks of a Megatron world do with real servers: sample from them, score what they sampled, train on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.sglang.engine import SGLangOptions, SGLangRollout
from prism_megatron.rollout.sglang.weights import Transport
from prism_megatron.sampling.handover import SharedHandover
from prism_megatron.sampling.shared_rollout import SharedRollout
from prism_megatron.training.batches import policy_batch
from prism_megatron.training.experience import ExperienceRow
from prism_megatron.training.policy_loss import Denominators, policy_loss
from prism_megatron.training.policy_update import UpdatePlan
from prism_megatron.training.roles import batch_format, build_policy, load_weights
from prism_megatron.types import Prompt, Response, Rollout, RolloutGroup, Segments
from tests.mini_players import update_plan

NO_REFERENCE = Response((), Segments(None, None, "these tests judge nothing"))


def gaps(policy: MegatronEngine, plan: UpdatePlan, groups: Sequence[RolloutGroup], *, train: bool) -> list[float]:
    """Largest distance of each group's log-probs from the policy's, in nats; ``train`` also takes a gradient step.

    The step follows tokens of alternating sign, so that it moves the policy whatever was sampled.
    """
    tokens = float(sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts))
    loss = partial(
        policy_loss,
        world=policy.world,
        objective=plan.objective,
        denominators=Denominators(tokens, tokens),
        temperature=plan.temperature,
    )
    batches = []
    for group in groups:
        signs = [[(-1.0) ** t for t in range(len(rollout.token_ids))] for rollout in group.rollouts]
        version = group.rollouts[0].versions[0].version
        rows = [ExperienceRow(group.prompt, r, sign) for r, sign in zip(group.rollouts, signs, strict=True)]
        batches.append(policy_batch(rows, form=plan.form, version=version))
    maxima = [policy.forward([batch], loss).maxima for batch in batches]
    if train:
        policy.forward_backward(batches, loss)
        policy.step()
    return [max(m["gap/text/max"], m["gap/image/max"]) for m in maxima]


def make_plan(shape: Qwen3VLShape, renderer: Renderer, world: World, sampling: Sampling) -> UpdatePlan:
    form = batch_format(renderer, world)
    return update_plan(form, tokens=4096, temperature=sampling.temperature)


@dataclass(frozen=True)
class Served:
    """Servers of ``folder``'s model, and room to spool weights for them."""

    folder: Path
    urls: tuple[str, ...]
    api_key: str
    spool: Path


def train_on_servers(
    world: World, served: Served, prompts: Sequence[Prompt], transports: Sequence[Transport]
) -> list[list[float]]:
    """The gaps of every prompt after each hand-over; the policy takes steps in between, so that each one differs."""
    folder = served.folder
    shape, renderer = Qwen3VLShape.from_folder(folder), Renderer.from_folder(folder)
    policy = build_policy(
        folder, shape, world=world, dtype=torch.float32, optimizer=OptimizerConfig(lr=1e-3), total_steps=100
    )
    sampling = Sampling(temperature=0.8, max_new_tokens=32)
    plan = make_plan(shape, renderer, world, sampling)
    found = []
    for version, transport in enumerate(transports):
        engine = SGLangRollout(
            folder,
            renderer.segment_finder,
            urls=served.urls,
            api_key=served.api_key,
            end_token_ids=[renderer.end_token_id],
            spool=served.spool / str(version),
            options=SGLangOptions(transport=transport),
        )
        rollout = SharedRollout(engine, world)
        SharedHandover(policy, rollout)(version, changed_only=False)
        drawn: list[tuple[Rollout, ...]] | None = None
        if world.is_main:
            drawn = rollout.generate(SampleRequest(prompts, 2, sampling, seed=0, step=0))
        groups = as_groups(prompts, broadcast_object(drawn, source=0))
        found.append(gaps(policy, plan, groups, train=True))
        rollout.close()
    return found


def score(world: World, folder: Path, groups: Sequence[RolloutGroup], sampling: Sampling) -> list[float]:
    """The gaps of rollouts that servers of ``folder`` drew."""
    shape, renderer = Qwen3VLShape.from_folder(folder), Renderer.from_folder(folder)
    policy = build_policy_to_score(folder, shape, world)
    return gaps(policy, make_plan(shape, renderer, world, sampling), groups, train=False)


def build_policy_to_score(folder: Path, shape: Qwen3VLShape, world: World) -> MegatronEngine:
    """Without an optimizer, whose state would be three times the weights."""
    policy = MegatronEngine(
        name="policy",
        provider=Qwen3VLProvider(shape),
        world=world,
        dtype=torch.float32,
        optimizer=None,
        total_steps=1,
    )
    load_weights(policy, folder)
    return policy


def as_groups(prompts: Sequence[Prompt], drawn: Sequence[tuple[Rollout, ...]]) -> list[RolloutGroup]:
    return [RolloutGroup(prompt, NO_REFERENCE, rollouts) for prompt, rollouts in zip(prompts, drawn, strict=True)]
