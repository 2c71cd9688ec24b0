"""What each rank does in the tests of micro-batches and of the two players, on the shipped mini."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model_providers.qwen3_vl import balance
from model_providers.qwen3_vl.decoder import Decoder
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.data.render import Renderer
from prism_megatron.engine.batch import Batch, beside_logits
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.logprobs import VocabularyOutput, places_of
from prism_megatron.engine.offload import own_state
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.provider import LossFn, LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.game import scoring_plan
from prism_megatron.game.credit import credit_groups, experience_of
from prism_megatron.game.judge import Judgement, train
from prism_megatron.game.scoring_plan import TrunkCost
from prism_megatron.losses.policy.clipped import clipped
from prism_megatron.losses.reduction import global_mean
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.training.policy_loss import Denominators, policy_loss
from prism_megatron.training.policy_update import UpdatePlan, policy_batches, update_policy
from prism_megatron.training.roles import batch_format
from prism_megatron.types import RolloutGroup
from tests.mini_players import FOLDER, judge_plan, mini_discriminator, mini_policy, update_plan

SEED = 7


@dataclass(frozen=True)
class Judged:
    """One discriminator step of a rank: what it counted itself, and the gradients before the step."""

    scores: dict[tuple[int, int, int | None], float]
    sums: dict[str, float]
    cost: TrunkCost
    gradients: dict[str, Tensor]
    trunk_tokens: int
    encoded_images: int


def discriminator_of(world: World, *, freeze_vision: bool = False) -> MegatronEngine:
    config = replace(MINI_ALIGN, discriminator=replace(MINI_ALIGN.discriminator, freeze_vision=freeze_vision))
    return mini_discriminator(world, config)


@dataclass(frozen=True)
class Setting:
    """What a step is run with."""

    tokens: int
    balance: float = 0.0
    share_prompts: bool = False
    freeze_vision: bool = False
    apart: bool = False
    """whether references have micro-batches of their own, which is cheaper only for long answers"""


def judged(world: World, groups: Sequence[RolloutGroup], setting: Setting) -> Judged:
    """Score and train once; count tokens at the decoder's door and images at the vision tower's."""
    engine = discriminator_of(world, freeze_vision=setting.freeze_vision)
    form = batch_format(Renderer.from_folder(FOLDER), world, share_prompts=setting.share_prompts)
    trunk_tokens, encoded, gradients = 0, 0, {}
    encode, step, decode = balance.encode, engine.step, Decoder.forward

    def counting_encode(vision: Any, images: Sequence[Any], *rest: Any) -> Any:
        nonlocal encoded
        encoded += len(images)
        return encode(vision, images, *rest)

    def counting_decode(self: Decoder, hidden: Tensor, *rest: Any, **keywords: Any) -> Tensor:
        nonlocal trunk_tokens
        trunk_tokens += hidden.shape[0] * hidden.shape[1]
        return decode(self, hidden, *rest, **keywords)

    def step_after_export() -> Any:
        gradients.update({name: gradient.clone() for name, gradient in engine.export_gradients()})
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "encode", counting_encode)
        patch.setattr(Decoder, "forward", counting_decode)
        patch.setattr(engine, "step", step_after_export)
        patch.setattr(scoring_plan, "WAYS", (scoring_plan.apart if setting.apart else scoring_plan.beside,))
        result = judge(engine, groups, form, world, tokens=setting.tokens, balance=setting.balance)
    return Judged(dict(result.scores), dict(result.sums), result.cost, gradients, trunk_tokens, encoded)


def judge(
    engine: MegatronEngine,
    groups: Sequence[RolloutGroup],
    form: BatchFormat,
    world: World,
    *,
    tokens: int,
    balance: float = 0.0,
) -> Judgement:
    return train(engine, groups, judge_plan(form, tokens=tokens, seed=SEED, balance=balance), world=world, step=0)


def plan_of(world: World, tokens: int) -> UpdatePlan:
    return update_plan(batch_format(Renderer.from_folder(FOLDER), world, share_prompts=True), tokens=tokens)


def credited(groups: Sequence[RolloutGroup], judgement: Judgement) -> Experience:
    credit = credit_groups(groups, judgement, MINI_ALIGN.game, seed=SEED, step=0, version=0)
    return experience_of(groups, credit, MINI_ALIGN.game, version=0)


def policy_gradients(
    world: World, groups: Sequence[RolloutGroup], tokens: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the strictly on-policy step, and those with old log-probs from a forward pass of their own."""
    plan, policy, discriminator = plan_of(world, tokens), mini_policy(world), discriminator_of(world)
    scored = judge(discriminator, groups, plan.form, world, tokens=tokens)
    batches = policy_batches(credited(groups, scored), plan, world=world)
    count = float(sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts))

    def logprobs_of(output: VocabularyOutput, batch: Batch) -> Tensor:
        targets, mask = (beside_logits(one, batch, world) for one in (batch.input_ids_B_S, batch.extras["label_mask"]))
        return output.scores(targets, places_of(mask)).logprobs_B_L

    def old_forward(output: VocabularyOutput, batch: Batch) -> LossOutput:
        old = logprobs_of(output, batch).detach()
        return LossOutput(old.sum(), rows={"old": old})

    def against_old(output: VocabularyOutput, batch: Batch) -> LossOutput:
        result = clipped(
            logprobs_of(output, batch),
            batch.extras["old"],
            beside_logits(batch.extras["advantages"], batch, world),
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=3.0,
        )
        mask = beside_logits(batch.extras["label_mask"], batch, world)
        return LossOutput(-global_mean(result.objective_n, mask, denominator=count))

    def gradients(of: Sequence[Batch], loss: LossFn) -> dict[str, Tensor]:
        policy.forward_backward(of, loss)
        return {name: gradient.clone() for name, gradient in policy.export_gradients()}

    denominators = Denominators(count, count)
    once = gradients(
        batches, partial(policy_loss, world=world, objective=plan.objective, denominators=denominators, temperature=1.0)
    )
    old = policy.forward(batches, old_forward).rows
    with_old = [
        replace(batch, extras={**batch.extras, "old": rows["old"]}) for batch, rows in zip(batches, old, strict=True)
    ]
    return once, gradients(with_old, against_old)


def gradients_of_few(world: World, groups: Sequence[RolloutGroup], answers: int) -> dict[str, Tensor]:
    """Gradients of a policy that learns from so many answers to one prompt."""
    rows = [
        ExperienceRow(groups[0].prompt, rollout, [number - 0.5] * len(rollout.token_ids))
        for number, rollout in enumerate(groups[0].rollouts[:answers])
    ]
    policy, plan = mini_policy(world), plan_of(world, tokens=16384)
    gradients: dict[str, Tensor] = {}
    step = policy.step

    def step_after_export() -> Any:
        gradients.update({name: gradient.clone() for name, gradient in policy.export_gradients()})
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "step", step_after_export)
        update_policy(policy, Experience(rows, version=0), plan, world=world)
    return gradients


def fingerprint(engine: MegatronEngine) -> str:
    """A hash of every byte of parameters, gradient buffers and optimizer state on this rank, and of the counts."""
    digest = hashlib.blake2b(repr(sorted(engine.progress().items())).encode())
    tensors: list[Tensor] = [p.data for module in engine.modules for p in module.parameters()]
    for chunk in engine._chunks:
        tensors += [buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    assert engine.optimizer is not None
    for inner in inner_optimizers(engine.optimizer):
        for group in inner.param_groups:
            digest.update(repr(sorted((k, v) for k, v in group.items() if k != "params")).encode())
            for parameter in group["params"]:
                tensors += [parameter.data, *inner.state[parameter].values()]
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def offloaded_rounds(world: World, groups: Sequence[RolloutGroup], dtype: torch.dtype) -> list[tuple[int, list[bytes]]]:
    """Without and with offload: bytes of gradients and state that stay after a step, and weights and state after three.

    The third step follows a look at the state as a checkpoint takes it.
    """
    outcomes = []
    for offload in (False, True):
        optimizer = replace(MINI_ALIGN.discriminator_optimizer, offload=offload)
        config = replace(MINI_ALIGN, discriminator_optimizer=optimizer)
        engine = mini_discriminator(world, config, dtype=dtype)
        form = batch_format(Renderer.from_folder(FOLDER), world)
        for step in range(3):
            judge(engine, groups, form, world, tokens=500)
            held = _held_bytes(engine)
            if step == 1:
                assert any(piece.tensor.any() for piece in engine.pieces() if ".exp_avg." in piece.key)
                assert (_held_bytes(engine) == 0) == offload
        engine._restore()
        assert engine.optimizer is not None
        tensors = [p.detach() for module in engine.modules for p in module.parameters()]
        tensors += own_state(engine._chunks, engine.optimizer)
        outcomes.append((held, [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]))
    return outcomes


def _held_bytes(engine: MegatronEngine) -> int:
    """Of gradient buffers, moments, and masters where they are not the parameters themselves."""
    assert engine.optimizer is not None
    tensors: list[Tensor] = [
        buffer.grad_data for chunk in engine._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    for inner in inner_optimizers(engine.optimizer):
        for parameter, state in inner.state.items():
            tensors += [state["exp_avg"], state["exp_avg_sq"]]
            if engine.dtype == torch.bfloat16:
                tensors.append(parameter.data)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def fingerprints_of_rounds(world: World, groups: Sequence[RolloutGroup], rounds: int) -> list[dict[str, list[str]]]:
    """Of both players at the start, after each step of the discriminator and after each of the policy."""
    plan, policy, discriminator = plan_of(world, 500), mini_policy(world), discriminator_of(world)
    seen: list[dict[str, list[str]]] = []

    def look() -> dict[str, str]:
        return {"policy": fingerprint(policy), "discriminator": fingerprint(discriminator)}

    for _ in range(rounds):
        hashes = [look()]
        scored = judge(discriminator, groups, plan.form, world, tokens=500)
        hashes.append(look())
        update_policy(policy, credited(groups, scored), plan, world=world)
        hashes.append(look())
        seen.append({name: [of[name] for of in hashes] for name in hashes[0]})
    return seen
