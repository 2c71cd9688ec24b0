"""What each leg of a registered arm is configured with: the world's recipes, and what the registration says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.experiments.effect import Control, Registration, Variant
from prism_megatron.config.experiments.mini import mini_align
from prism_megatron.config.experiments.mini_rlvr import mini_rlvr
from prism_megatron.config.stages.arm import Arm
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.exam import ExamConfig
from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.config.stages.warm_start import WarmStartConfig, mini_warm_start

KINDS: dict[Variant, DiscriminatorConfig] = {
    "segment": DiscriminatorConfig(),
    "learned": DiscriminatorConfig(routing="learned"),
    "dense": DiscriminatorConfig(routing="dense"),
    "text": DiscriminatorConfig(modality="text"),
}


def warm_start_of(
    registered: Registration, variant: Variant, policy: Path, target: Path, *, prompts: Path | None, seed: int
) -> WarmStartConfig:
    """A discriminator of this kind, written to the run folder ``target``, against the policy's answers to ``prompts``,
    or without them to scenes of its own.
    """
    recipe, kind = mini_warm_start(registered.world), KINDS[variant]
    return replace(
        recipe,
        model=replace(recipe.model, model=str(policy)),
        discriminator=replace(recipe.discriminator, routing=kind.routing, modality=kind.modality),
        checkpoint=replace(recipe.checkpoint, output=target, save_every=registered.warm_start_steps),
        gate=replace(recipe.gate, min_auc=0.0),
        prompts=prompts,
        steps=registered.warm_start_steps,
        seed=seed,
    )


def alignment_of(
    registered: Registration, variant: Variant, control: Control | None, *, policy: Path, discriminator: Path,
    prompts: Path | None, seed: int,
) -> Arm:  # fmt: skip
    """Alignment of ``policy`` by the ``discriminator`` of this kind, or what a control makes of it."""
    recipe = mini_align(registered.world, records=False)
    game = replace(
        recipe.game,
        length_scores=control == "length",
        shuffle_scores=control == "shuffled",
        freeze_discriminator=control == "random",
        freeze_policy=control == "lr0",
    )
    config = replace(
        recipe,
        model=ModelConfig(model=str(policy), mini=registered.world),
        discriminator=replace(KINDS[variant], discriminator=str(discriminator)),
        game=game,
        prompts=prompts,
        policy=OptimizerConfig(lr=registered.align_lr),
        steps=registered.align_steps,
        seed=seed,
    )
    return Arm(control or variant, config, random_discriminator=control == "random")


def rlvr_of(registered: Registration, algo: str, *, policy: Path, prompts: Path, steps: int, seed: int) -> RLVRConfig:
    """Verifiable rewards by this algorithm, on the prompts of a regime."""
    return replace(
        mini_rlvr(algo, mini=registered.world, records=False),
        model=ModelConfig(model=str(policy), mini=registered.world),
        exam=ExamConfig(eval_prompts=0),
        prompts=prompts,
        steps=steps,
        seed=seed,
    )
