"""One seed of a registration: every arm from its own fine-tuned policy on; what is done is never done again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from prism_megatron.config.experiments.effect import (
    BASE,
    REFERENCES,
    SFT,
    Control,
    Regime,
    RegimeName,
    Registration,
    Variant,
)
from prism_megatron.config.experiments.effect_recipes import alignment_of
from prism_megatron.config.experiments.mini import mini_align
from prism_megatron.config.experiments.mini_world import mini_folder
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.teachers import SLOPPY_TEACHER
from prism_megatron.data.tokenizer import END_TOKEN
from prism_megatron.disk import write_atomically
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.experiments.effect.answers import ask, write_responses
from prism_megatron.experiments.effect.legs import Legs
from prism_megatron.experiments.effect.prompts import FIRST_OF_RLVR, write_prompts
from prism_megatron.run.alone import alone_in
from prism_megatron.run.files import EXPORT, SUMMARY
from prism_megatron.sampling.scene_answers import heldout_scenes

POLICY = "policy"
FAITHFUL, TAUGHT = "faithful", "taught"
"""Texts that answers are compared with: of the same scenes without a fault, and what fine-tuning learned from."""
DONE = "done.json"


def arm_name(start: str, algo: str, regime: RegimeName) -> str:
    """Of an arm that goes on with RLVR. Example: ``"align → grpo, guessable"``."""
    return f"{start} → {algo}, {regime}"


def arms_of(registered: Registration, place: int) -> list[str]:
    """All arms of seed number ``place`` in the registration, in the order in which they are run."""
    reinforced = [
        arm_name(start, algo, name)
        for name, regime in registered.regimes.items()
        if place < regime.seeds
        for start, algo in registered.reinforced_in(name)
    ]
    return [BASE, SFT, REFERENCES, *registered.aligned, *reinforced]


def folder_of(output: Path, seed: int, arm: str) -> Path:
    """Where an arm's policy and answers are."""
    words = arm.replace("→", "then").replace(",", "").split()
    return output / f"seed-{seed}" / "-".join(words)


def texts_of(output: Path, seed: int, name: str) -> Path:
    """Where texts are that the seed's answers are compared with: ``FAITHFUL`` or ``TAUGHT``."""
    return output / f"seed-{seed}" / f"{name}.jsonl"


def is_done(folder: Path) -> bool:
    """Whether everything of an arm is there."""
    return (folder / DONE).is_file()


@dataclass(frozen=True)
class Seed:
    """What one seed is run with."""

    registered: Registration
    seed: int
    output: Path
    world: World
    commit: str
    """the code's, which is kept with every arm"""

    def run(self) -> None:
        """Every arm that is not done yet.

        Raises ConfigError where another process is at work on this seed, and PrismError as the stages.
        """
        with alone_in(self.output / f"seed-{self.seed}", command="make effect"):
            self._run()

    def _run(self) -> None:
        registered, legs = self.registered, Legs(self.registered, self.seed, self.world)
        recipe = mini_align(registered.world, records=False)
        base = mini_folder(registered.world) / "base"
        self._arm(BASE, lambda target: _copy(base, target / POLICY))
        self._write_texts()
        sft = self._arm(SFT, lambda target: legs.fine_tune(target / POLICY)) / POLICY
        seen = self._align_prompts(sft)
        self._arm(
            REFERENCES,
            lambda target: legs.learn_references(
                sft, target / POLICY, prompts=seen, prompts_per_step=recipe.rollout.prompts_per_step
            ),
        )
        for arm, (variant, control) in registered.aligned.items():
            self._arm(arm, partial(self._aligned, legs, sft, variant, control, prompts=seen))
        place = registered.seeds.index(self.seed)
        for name, regime in registered.regimes.items():
            if place >= regime.seeds:
                continue
            prompts = self.output / f"seed-{self.seed}" / f"{name}.jsonl"
            if not prompts.exists():
                write_prompts(
                    regime,
                    sft,
                    prompts,
                    mini=registered.world,
                    first=FIRST_OF_RLVR,
                    max_new_tokens=recipe.data.max_response_tokens,
                    seed=self.seed,
                    world=self.world,
                )
            for start, algo in registered.reinforced_in(name):
                steps = registered.policy_steps - (0 if start == SFT else registered.align_steps)
                source = folder_of(self.output, self.seed, start) / POLICY
                self._arm(
                    arm_name(start, algo, name), partial(_reinforced, legs, source, prompts, algo=algo, steps=steps)
                )

    def _align_prompts(self, sft: Path) -> Path | None:
        """The file of the scenes that are seen again and again, where they are."""
        if not self.registered.align_prompts:
            return None
        path = self.output / f"seed-{self.seed}" / "align.jsonl"
        if not path.exists():
            few = Regime(prompts=self.registered.align_prompts, comparisons=self.registered.align_comparisons)
            write_prompts(
                few, sft, path, mini=self.registered.world, first=0, max_new_tokens=1, seed=self.seed, world=self.world
            )
        return path

    def _aligned(
        self, legs: Legs, sft: Path, variant: Variant, control: Control | None, target: Path, *, prompts: Path | None
    ) -> Figures:
        discriminator = self.output / f"seed-{self.seed}" / f"discriminator-{variant}"
        if not (discriminator / SUMMARY).exists() or not (discriminator / EXPORT).exists():
            _make_room(discriminator)
            legs.warm_up(sft, variant, discriminator, prompts=prompts)
        arm = alignment_of(
            self.registered, variant, control, policy=sft, discriminator=discriminator / EXPORT, prompts=prompts,
            seed=self.seed,
        )  # fmt: skip
        return legs.align(arm, target / POLICY)

    def _arm(self, arm: str, train: Callable[[Path], Figures | None]) -> Path:
        """The folder of an arm that is trained, asked and written down."""
        target = folder_of(self.output, self.seed, arm)
        if is_done(target):
            return target
        _make_room(target)
        target.mkdir(parents=True)
        began = time.monotonic()
        last = train(target) or {}
        trained = time.monotonic()
        ask(
            target / POLICY, self._scenes, self._renderer, target, samples=self.registered.samples,
            max_new_tokens=mini_align(self.registered.world, records=False).data.max_response_tokens, seed=self.seed,
            world=self.world,
        )  # fmt: skip
        asked = time.monotonic()
        done = {"commit": self.commit, "train_seconds": round(trained - began, 1),
                "ask_seconds": round(asked - trained, 1), "last_step": last}  # fmt: skip
        write_atomically(target / DONE, json.dumps(done, indent=1) + "\n")
        print(f"seed {self.seed}, {arm}: {trained - began:.0f} s, asked {asked - trained:.0f} s", flush=True)
        return target

    def _write_texts(self) -> None:
        """What answers are compared with: references of the same scenes, and what fine-tuning was taught."""
        renderer, mini = self._renderer, self.registered.world
        taught = SceneSource(
            renderer, split="sft", seed=self.seed, batch_size=self.registered.scenes, teacher=SLOPPY_TEACHER[mini],
            faithful_share=self.registered.faithful_share, world=mini,
        )  # fmt: skip
        for name, examples in ((FAITHFUL, self._scenes), (TAUGHT, taught.batch(0))):
            path = texts_of(self.output, self.seed, name)
            if not path.exists():
                texts = [renderer.decode(one.reference.token_ids).removesuffix(END_TOKEN) for one in examples]
                write_responses(path, [one.prompt.id for one in examples], texts)

    @cached_property
    def _renderer(self) -> Renderer:
        """Every policy of the seed has the base's tokenizer."""
        return Renderer.from_folder(mini_folder(self.registered.world) / "base", system_prompt=None)

    @cached_property
    def _scenes(self) -> Sequence[Example]:
        """The same for every arm and seed."""
        return heldout_scenes(
            self._renderer, count=self.registered.scenes, seed=self.registered.scenes_seed, world=self.registered.world
        )


def _reinforced(legs: Legs, source: Path, prompts: Path, target: Path, *, algo: str, steps: int) -> Figures:
    return legs.reinforce(source, algo, prompts, target / POLICY, steps=steps)


def _copy(base: Path, target: Path) -> None:
    shutil.copytree(base, target, copy_function=shutil.copyfile)


def _make_room(folder: Path) -> None:
    """Half of an arm is worth nothing: it is run anew from its start."""
    if folder.exists():
        shutil.rmtree(folder)


def read_done(folder: Path) -> dict[str, object]:
    """Commit, seconds and last figures of an arm that is done."""
    found: dict[str, object] = json.loads((folder / DONE).read_text(encoding="utf-8"))
    return found
