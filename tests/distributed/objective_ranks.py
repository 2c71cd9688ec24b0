"""What each rank does in the tests of objectives: the tiny Qwen3-VL learns from answers whose figures are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.data.render import Renderer
from prism_megatron.engine import logprobs
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.training.policy_loss import Denominators, denominators_of, policy_loss
from prism_megatron.training.policy_update import (
    PolicyUpdate,
    UpdatePlan,
    planned_batches,
    policy_batches,
    scores_of,
    update_policy,
)
from prism_megatron.training.roles import batch_format
from prism_megatron.training.token_logprobs import TokenScores
from prism_megatron.types import Prompt, Rollout, RolloutGroup, Segments, VersionSpan
from tests.distributed import tiny
from tests.mini_players import FOLDER, mini_policy, update_plan

WHOLE, FEW = 10_000, 60


@dataclass(frozen=True)
class Given:
    """Of one answer's tokens."""

    advantages: list[float]
    old: list[float]
    reference: list[float]
    weights: list[float]


@dataclass(frozen=True)
class Learnt:
    """Gradients of all weights in one vector (on rank 0), and the pass's figures."""

    gradient: Tensor | None
    sums: Mapping[str, float]


def form(world: World) -> BatchFormat:
    return BatchFormat(tiny.PAD, 1, world.parallel.length_multiple, world.device)


def plan(world: World, objective: PolicyObjective, budget: int) -> UpdatePlan:
    return UpdatePlan(objective, form(world), budget)


def experience(given: Sequence[Given] = ()) -> Experience:
    """Eight answers of 1 to 11 tokens, every other one about an image; without ``given`` nothing is known of them."""
    rows = []
    for number, (row, mask) in enumerate(tiny.rows(0)):
        start = len(mask) - int(sum(mask))
        tokens = row.token_ids[start:]
        rollout = Rollout(
            tokens, (-1.0,) * len(tokens), "stop", (VersionSpan(0, 0, len(tokens)),), Segments(None, None, "unjudged")
        )
        prompt = Prompt(str(number), row.token_ids[:start], row.images, "?")
        rows.append(ExperienceRow(prompt, rollout, [0.0] * len(tokens)))
    for number, own in enumerate(given):
        rows[number] = replace(
            rows[number],
            advantages=own.advantages,
            old_logprobs=own.old,
            reference_logprobs=own.reference,
            weights=own.weights,
        )
    return Experience(rows, version=0)


def scores(world: World, budget: int) -> list[TokenScores]:
    """Log-probs and entropies of every answer's tokens, under the weights that every run starts from."""
    engine = tiny.build(world)
    return scores_of(engine, experience(), plan(world, PolicyObjective(), budget), world=world)


def _gradient(engine: MegatronEngine) -> Tensor | None:
    found = {name: gradient.clone().flatten() for name, gradient in engine.export_gradients()}
    return torch.cat([found[name] for name in sorted(found)]) if engine.world.is_main else None


def learnt(
    world: World,
    given: Sequence[Given],
    objectives: Mapping[str, PolicyObjective],
    budget: int,
    chunk_elements: int = 2**25,
) -> dict[str, Learnt]:
    """Every objective's gradient on all answers, in micro-batches of ``budget`` tokens."""
    logprobs._CHUNK_ELEMENTS = chunk_elements
    engine, own = tiny.build(world), experience(given)
    found = {}
    for name, objective in objectives.items():
        loss = partial(
            policy_loss, world=world, objective=objective, denominators=denominators_of(own, objective), temperature=1.0
        )
        output = engine.forward_backward(policy_batches(own, plan(world, objective, budget), world=world), loss)
        found[name] = Learnt(_gradient(engine), {**output.sums, **output.maxima})
    return found


def linear(world: World, coefficients: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Tensor | None]:
    """Gradients of ``sum c_t log pi_t``, one answer to a micro-batch: what a twin's derivatives make of the weights."""
    engine, found = tiny.build(world), {}
    for name, own in coefficients.items():
        rows = [replace(row, advantages=[-c for c in cs]) for row, cs in zip(experience().rows, own, strict=True)]
        loss = partial(
            policy_loss, world=world, objective=PolicyObjective(), denominators=Denominators(1.0, 1.0), temperature=1.0
        )
        batches = policy_batches(Experience(rows, version=0), plan(world, PolicyObjective(), 1), world=world)
        engine.forward_backward(batches, loss)
        found[name] = _gradient(engine)
    return found


def four_mini_batches(
    world: World, given: Sequence[Given], objectives: Mapping[str, PolicyObjective], lr: float
) -> dict[str, PolicyUpdate]:
    """A whole step of each objective, from the same weights, on the same answers."""
    found = {}
    for name, objective in objectives.items():
        engine = tiny.build(world, optimizer=OptimizerConfig(lr=lr))
        rows = [replace(row, old_logprobs=None, weights=None) for row in experience(given).rows]
        found[name] = update_policy(engine, Experience(rows, version=0), plan(world, objective, WHOLE), world=world)
    return found


def scores_of_the_mini(world: World, groups: Sequence[RolloutGroup], budget: int) -> tuple[list[TokenScores], int]:
    """Those of answers that the mini's embedded engine has drawn, and how many micro-batches this rank had of them."""
    rows = [
        ExperienceRow(group.prompt, rollout, [0.0] * len(rollout.token_ids))
        for group in groups
        for rollout in group.rollouts
    ]
    own = update_plan(batch_format(Renderer.from_folder(FOLDER), world), tokens=budget)
    given = Experience(rows, version=0)
    found = scores_of(mini_policy(world), given, own, world=world)
    return found, len(planned_batches(given, own, world=world))
