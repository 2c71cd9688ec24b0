"""The legs that an arm is made of: from one policy's folder to the next one's, by a stage of the method or a control.

Every leg keeps weights in fp32: a step of 1e-4 is below what bfloat16 resolves.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.experiments.effect import Registration, Variant
from prism_megatron.config.experiments.effect_recipes import rlvr_of, warm_start_of
from prism_megatron.config.experiments.mini import mini_align
from prism_megatron.config.experiments.mini_world import SupervisedPhase, make_mini_recipe, mini_folder
from prism_megatron.config.stages.arm import Arm
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet, selected_scenes
from prism_megatron.data.selection import read_selection
from prism_megatron.data.teachers import SLOPPY_TEACHER
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.experiments.effect.random_weights import RandomSource
from prism_megatron.experiments.make_mini import Lesson, supervised
from prism_megatron.game.figures import game_row, rights_of
from prism_megatron.run.session import Session
from prism_megatron.stages.align.build import build as build_alignment
from prism_megatron.stages.rlvr.build import build as build_rlvr
from prism_megatron.stages.warm_start.build import warm_up_on
from prism_megatron.training.roles import export_folder


@dataclass(frozen=True)
class Legs:
    """All legs of one seed."""

    registered: Registration
    seed: int
    world: World

    def fine_tune(self, target: Path) -> None:
        """From the base, on what the world's sloppy teacher wrote of three scenes in four."""
        mini = self.registered.world
        lesson = Lesson(mini, "sft", SLOPPY_TEACHER[mini], vision=False, faithful_share=self.registered.faithful_share)
        phase, base = make_mini_recipe(mini).sft, mini_folder(mini) / "base"
        supervised(phase, base, target, lesson, seed=self.seed, world=self.world, stored=torch.float32)

    def learn_references(self, policy: Path, target: Path, *, prompts: Path | None, prompts_per_step: int) -> None:
        """Supervised, on the references that alignment sees, as often, in its order and at its rate; the same parts of
        the policy learn.
        """
        mini = self.registered.world
        scenes: SceneSet | None = None
        if prompts is not None:
            chosen = selected_scenes(read_selection(prompts), split="align", mini=mini)
            scenes = SceneSet(chosen, Renderer.from_folder(policy, system_prompt=None), seed=self.seed, batch_size=1)
        frozen = mini_align(mini, records=False).model.freeze_policy_vision
        lesson = Lesson(mini, "align", "faithful", vision=not frozen)
        phase = SupervisedPhase(
            steps=self.registered.align_steps,
            rows_per_step=prompts_per_step,
            optimizer=OptimizerConfig(lr=self.registered.align_lr),
        )
        supervised(phase, policy, target, lesson, seed=self.seed, world=self.world, stored=torch.float32, scenes=scenes)

    def warm_up(self, policy: Path, variant: Variant, target: Path, *, prompts: Path | None) -> None:
        """A discriminator of this kind against the policy's answers, to these prompts or to any."""
        config = warm_start_of(self.registered, variant, policy, target, prompts=prompts, seed=self.seed)
        warm_up_on(self.world, config)

    def align(self, arm: Arm, target: Path) -> Figures:
        """Play the game and write the policy; the figures of its last step."""
        config = arm.config
        assert config.model.model is not None and config.discriminator.discriminator is not None
        with closing(build_alignment(config, Session(self.world, target, quiet=True))) as stage:
            if arm.random_discriminator:
                source = open_weights(Path(config.discriminator.discriminator))
                stage.players.discriminator.load_hf(RandomSource(source, self.seed))
            stage.prepare(0)
            for step in range(config.steps):
                stage.play(step)
            assert stage.last is not None
            groups = stage.last.groups
            rights = rights_of(stage.last.examples, groups, stage.exports.renderer)
            self._write(stage.players.policy, target, like=Path(config.model.model))
            return game_row(groups, stage.last.judgement, rights)

    def reinforce(self, policy: Path, algo: str, prompts: Path, target: Path, *, steps: int) -> Figures:
        """RLVR on these prompts; the figures of its last step."""
        config = rlvr_of(self.registered, algo, policy=policy, prompts=prompts, steps=steps, seed=self.seed)
        row: Figures = {}
        with closing(build_rlvr(config, Session(self.world, target, quiet=True))) as stage:
            stage.prepare(0)
            for step in range(steps):
                row = {name: value for name, value in stage.play(step).row.items() if isinstance(value, (int, float))}
            self._write(stage.learner.policy, target, like=policy)
        return row

    def _write(self, policy: MegatronEngine, target: Path, *, like: Path) -> None:
        export_folder(policy, target, like=like, world=self.world, dtype=torch.float32)
