"""A step of each stage on the real code, as one rank of a layout, on tensors without contents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.model import FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import NO_ROUTER_LOSSES, RouterLosses
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.engine.dry.counted import Counted
from prism_megatron.engine.dry.world import DryEngine, dry_world
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.provider import ModelProvider
from prism_megatron.engine.runtime import World
from prism_megatron.forecast.workload import END_TOKEN, PAD_TOKEN, Workload, demonstrations, experience, groups
from prism_megatron.game import judge
from prism_megatron.training import supervised_update
from prism_megatron.training.batches import BatchFormat, supervised_batch
from prism_megatron.training.policy_update import UpdatePlan, update_policy

Play = Literal["sft", "align", "rlvr", "judge"]
"""Fine-tuning; alignment's update of the policy; one with a reference's and its own old log-probs; the discriminator's
scores and update."""


@dataclass(frozen=True)
class Case:
    """A step, a model and a place in a world.

    Example: ``Case("align", shape, ParallelConfig(tp=4, pp=2), rank=7, world_size=8)``.
    """

    play: Play
    shape: Qwen3VLShape
    """of the policy, or of the dense model that the discriminator is made of"""
    parallel: ParallelConfig
    rank: int = 0
    world_size: int = 1
    work: Workload = field(default_factory=Workload)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: PolicyObjective = field(default_factory=PolicyObjective)
    router_losses: RouterLosses = NO_ROUTER_LOSSES
    towers: Towers | None = None
    load_balance: float = 0.0
    """coefficient of a discriminator's load-balancing loss"""
    dtype: torch.dtype = torch.bfloat16
    freeze: tuple[FreezeGroup, ...] = ()
    """parts that stay as loaded; of a discriminator its vision tower with the projector, or nothing"""
    fp32_head: bool = False


def play(case: Case) -> Counted:
    """Play the step and say what it held. Raises what a GPU would raise, and HostWaitError where it would wait.

    Changes torch and Megatron for the rest of the process.
    """
    with dry_world(case.parallel, rank=case.rank, world_size=case.world_size) as dry:
        engine = DryEngine(dry, **settings_of(case))
        step(case, engine, dry.world)
        return engine.counted


def settings_of(case: Case) -> dict[str, Any]:
    """What the role's engine is built of, but for its world."""
    return {
        "name": "discriminator" if case.play == "judge" else "policy",
        "provider": provider_of(case),
        "dtype": case.dtype,
        "optimizer": case.optimizer,
        "total_steps": 1,
    }


def step(case: Case, engine: MegatronEngine, world: World) -> None:
    """The step of the case on an engine, whose tensors may be real."""
    form = BatchFormat(
        pad_token_id=PAD_TOKEN,
        end_token_id=END_TOKEN,
        length_multiple=PrecisionConfig().length_multiple(case.parallel),
        device=world.device,
        share_prompts=case.work.share_prompts,
    )
    _STEPS[case.play](case, engine, form, world)


def provider_of(case: Case) -> ModelProvider:
    """What builds the role that is played."""
    execution = Execution(case.recompute, PrecisionConfig(fp32_head=case.fp32_head))
    if case.play == "judge":
        return DiscriminatorProvider(
            case.shape, case.towers, freeze_vision="vision" in case.freeze, execution=execution
        )
    return Qwen3VLProvider(case.shape, freeze=case.freeze, router_losses=case.router_losses, execution=execution)


def _sft(case: Case, engine: MegatronEngine, form: BatchFormat, world: World) -> None:
    rows = demonstrations(case.shape, case.work)
    at_once = max(1, case.work.tokens_per_microbatch // form.slot(len(rows[0][0].token_ids)))
    parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    batches = [
        supervised_batch([row for row, _ in part], [mask for _, mask in part], form=form, pack=True) for part in parts
    ]
    supervised_update.learn(engine, batches, world=world)


def _update(case: Case, engine: MegatronEngine, form: BatchFormat, world: World) -> None:
    plan = UpdatePlan(case.objective, form, case.work.tokens_per_microbatch)
    update_policy(engine, experience(case.shape, case.work), plan, world=world)


def _rlvr(case: Case, engine: MegatronEngine, form: BatchFormat, world: World) -> None:
    objective = replace(case.objective, family="clipped", mini_batches=2)
    _update(replace(case, objective=objective), engine, form, world)


def _judge(case: Case, engine: MegatronEngine, form: BatchFormat, world: World) -> None:
    plan = judge.JudgePlan(
        form,
        case.work.tokens_per_microbatch,
        score_regulariser=0.001,
        seed=0,
        load_balance=case.load_balance,
    )
    judge.train(engine, groups(case.shape, case.work), plan, world=world, step=0)


_STEPS: Mapping[Play, Callable[[Case, MegatronEngine, BatchFormat, World], None]] = {
    "sft": _sft,
    "align": _update,
    "rlvr": _rlvr,
    "judge": _judge,
}
