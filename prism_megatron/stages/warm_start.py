"""The discriminator's warm-start: Bradley-Terry on references against fresh samples of a fixed policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism_megatron.config.game import GameConfig
from prism_megatron.data.loader import Example
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.stages.batches import BatchFormat
from prism_megatron.stages.judge import Judgement, judge_and_train
from prism_megatron.stages.sampling import sample_groups
from prism_megatron.types import RolloutGroup


def warm_start(
    discriminator: MegatronEngine,
    rollout: RolloutEngine,
    prompts: Callable[[int], Sequence[Example]],
    sampling: Sampling,
    game: GameConfig,
    *,
    world: World,
    form: BatchFormat,
    rollouts_per_prompt: int,
    tokens_per_microbatch: int,
    load_balance: float,
    steps: range,
    seed: int,
    on_step: Callable[[int, Sequence[Example], Sequence[RolloutGroup], Judgement], None],
) -> None:
    """Train the discriminator for ``steps``; with ``game.freeze_discriminator`` it only scores, as a measurement."""
    for step in steps:
        examples = prompts(step)
        groups = sample_groups(rollout, examples, sampling, n=rollouts_per_prompt, seed=seed, step=step, world=world)
        judgement = judge_and_train(
            discriminator,
            groups,
            game,
            world=world,
            form=form,
            seed=seed,
            step=step,
            tokens_per_microbatch=tokens_per_microbatch,
            load_balance=load_balance,
        )
        on_step(step, examples, groups, judgement)
