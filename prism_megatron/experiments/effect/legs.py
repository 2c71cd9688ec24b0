"""The legs that an arm is made of: from one policy's folder to the next one's, by a stage of the method or a control.

Every leg keeps weights in fp32: a step of 1e-4 is below what bfloat16 resolves.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.experiments.effect import Control, Registration, Variant
from prism_megatron.config.experiments.mini import mini_align
from prism_megatron.config.experiments.mini_rlvr import mini_rlvr
from prism_megatron.config.experiments.mini_world import SupervisedPhase, make_mini_recipe, mini_folder
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.exam import ExamConfig
from prism_megatron.config.stages.warm_start import mini_warm_start
from prism_megatron.conversion.open_source import open_weights
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet, selected_scenes
from prism_megatron.data.selection import read_selection
from prism_megatron.data.teachers import SLOPPY_TEACHER
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.experiments.make_mini import Lesson, supervised
from prism_megatron.experiments.played import RandomSource
from prism_megatron.game.figures import game_row, rights_of
from prism_megatron.run.files import EXPORT
from prism_megatron.run.session import Session
from prism_megatron.stages.align.build import build as build_alignment
from prism_megatron.stages.rlvr.build import build as build_rlvr
from prism_megatron.stages.warm_start.build import warm_up_on
from prism_megatron.training.roles import export_folder

KINDS: dict[Variant, DiscriminatorConfig] = {
    "segment": DiscriminatorConfig(),
    "learned": DiscriminatorConfig(routing="learned"),
    "dense": DiscriminatorConfig(routing="dense"),
    "text": DiscriminatorConfig(modality="text"),
}


@dataclass(frozen=True)
class Legs:
    """All legs of one seed."""

    registered: Registration
    seed: int
    world: World

    def fine_tune(self, target: Path) -> None:
        """From the base, on what the world's sloppy teacher wrote of three scenes in four."""
        mini = self.registered.world
        lesson = Lesson(mini, "sft", SLOPPY_TEACHER[mini], vision=False)
        base = mini_folder(mini) / "base"
        supervised(
            make_mini_recipe(mini).sft, base, target, lesson, seed=self.seed, world=self.world, stored=torch.float32
        )

    def learn_references(self, policy: Path, target: Path, *, prompts: Path | None, prompts_per_step: int) -> None:
        """Supervised, on the references that alignment sees, as often, in its order and at its rate."""
        mini = self.registered.world
        scenes: SceneSet | None = None
        if prompts is not None:
            chosen = selected_scenes(read_selection(prompts), split="align", mini=mini)
            scenes = SceneSet(chosen, Renderer.from_folder(policy, system_prompt=None), seed=self.seed, batch_size=1)
        lesson = Lesson(mini, "align", "faithful", vision=False)
        phase = SupervisedPhase(
            steps=self.registered.align_steps,
            rows_per_step=prompts_per_step,
            optimizer=OptimizerConfig(lr=self.registered.align_lr),
        )
        supervised(phase, policy, target, lesson, seed=self.seed, world=self.world, stored=torch.float32, scenes=scenes)

    def warm_up(self, policy: Path, variant: Variant, target: Path) -> None:
        """A discriminator of this kind against the policy's answers."""
        recipe, kind = mini_warm_start(self.registered.world), KINDS[variant]
        warm_up_on(
            self.world,
            replace(
                recipe,
                model=replace(recipe.model, model=str(policy)),
                discriminator=replace(recipe.discriminator, routing=kind.routing, modality=kind.modality),
                checkpoint=replace(recipe.checkpoint, output=target, save_every=self.registered.warm_start_steps),
                gate=replace(recipe.gate, min_auc=0.0),
                steps=self.registered.warm_start_steps,
                seed=self.seed,
            ),
        )

    def alignment(
        self, policy: Path, discriminator: Path, variant: Variant, control: Control | None, *, prompts: Path | None
    ) -> AlignConfig:
        """The configuration of an arm of alignment."""
        recipe = mini_align(self.registered.world, records=False)
        game = replace(
            recipe.game,
            length_scores=control == "length",
            shuffle_scores=control == "shuffled",
            freeze_discriminator=control == "random",
            freeze_policy=control == "lr0",
        )
        return replace(
            recipe,
            model=ModelConfig(model=str(policy), mini=self.registered.world),
            discriminator=replace(KINDS[variant], discriminator=str(discriminator / EXPORT)),
            game=game,
            prompts=prompts,
            policy=OptimizerConfig(lr=self.registered.align_lr),
            steps=self.registered.align_steps,
            seed=self.seed,
        )

    def align(self, config: AlignConfig, target: Path, *, random: bool) -> Figures:
        """Play the game and write the policy; the figures of its last step. ``random``: the discriminator is noise."""
        with closing(build_alignment(config, Session(self.world, target, quiet=True))) as stage:
            if random:
                assert config.discriminator.discriminator is not None
                source = open_weights(Path(config.discriminator.discriminator))
                stage.players.discriminator.load_hf(RandomSource(source, self.seed))
            stage.prepare(0)
            for step in range(config.steps):
                stage.play(step)
            assert stage.last is not None
            groups = stage.last.groups
            rights = rights_of(stage.last.examples, groups, stage.exports.renderer)
            self._write(stage.players.policy, config.model, target)
            return game_row(groups, stage.last.judgement, rights)

    def reinforce(self, policy: Path, algo: str, prompts: Path, target: Path, *, steps: int) -> Figures:
        """RLVR on these prompts; the figures of its last step."""
        recipe = mini_rlvr(algo, mini=self.registered.world, records=False)
        config = replace(
            recipe,
            model=ModelConfig(model=str(policy), mini=self.registered.world),
            exam=ExamConfig(eval_prompts=0),
            prompts=prompts,
            steps=steps,
            seed=self.seed,
        )
        row: Figures = {}
        with closing(build_rlvr(config, Session(self.world, target, quiet=True))) as stage:
            stage.prepare(0)
            for step in range(steps):
                row = {name: value for name, value in stage.play(step).row.items() if isinstance(value, (int, float))}
            self._write(stage.learner.policy, config.model, target)
        return row

    def _write(self, policy: MegatronEngine, model: ModelConfig, target: Path) -> None:
        assert model.model is not None
        export_folder(policy, target, like=Path(model.model), world=self.world, dtype=torch.float32)
