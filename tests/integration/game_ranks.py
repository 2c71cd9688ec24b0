"""What ranks run to play whole steps of the game on the mini's models with scripted rollouts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config.game import GameConfig
from prism_megatron.config.mini import MINI_ALIGN
from prism_megatron.config.mini_world import MINI_FOLDER
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.checkpoint_folder import ModelFiles
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.teachers import write
from prism_megatron.engine import checkpoint
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.game.memory import GameMemory
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.stages.align.build import build_discriminator
from prism_megatron.stages.align.rows import step_row
from prism_megatron.stages.align.stage import AlignPlan, AlignStep, Players, align
from prism_megatron.training.roles import batch_format, build_policy
from prism_megatron.types import Prompt, Rollout, VersionSpan

PROMPTS, ROLLOUTS, SEED = 2, 3, 5
FOLDER = MINI_FOLDER / "policy"
Row = dict[str, Any]


class Script:
    """A rollout engine that answers from a table: in a valid step as other scenes would be answered, else cut short."""

    def __init__(self, renderer: Renderer, valid_steps: Sequence[int]) -> None:
        self._renderer = renderer
        self._valid_steps = valid_steps
        self._answers = SceneSource(renderer, split="sft", seed=SEED, batch_size=ROLLOUTS)
        self.policy_version: int | None = None
        self.expert_layout: ExpertLayout = "transformers"

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        for _ in tensors:  # every rank takes part in the export
            pass
        self.policy_version = version

    def sleep(self) -> None:
        """Nothing to release."""

    def wake(self) -> None:
        """Nothing was released."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        prompt_offset: int = 0,
        samples: Sequence[range] | None = None,
    ) -> list[tuple[Rollout, ...]]:
        del sampling, seed
        asked = samples or [range(n) for _ in prompts]
        return [
            tuple(self._answer(step, prompt_offset + p, sample) for sample in numbers)
            for p, numbers in enumerate(asked)
        ]

    def _answer(self, step: int, prompt: int, sample: int) -> Rollout:
        assert self.policy_version is not None
        answer = self._answers.example((step * PROMPTS + prompt) * ROLLOUTS + sample)
        assert answer.scene is not None
        tokens = self._renderer.response(*write(answer.scene, "sloppy", seed=SEED)).token_ids
        if step not in self._valid_steps:
            tokens = tokens[:8]
        span = VersionSpan(self.policy_version, 0, len(tokens))
        return Rollout(tokens, (0.0,) * len(tokens), "stop", (span,), self._renderer.segment_finder.find(tokens))

    def close(self) -> None:
        """Nothing is held."""


def digest(engine: MegatronEngine) -> str:
    """Of all weights, moments and masters of this rank."""
    found = hashlib.sha256()
    for name, tensor in engine.export_hf():
        found.update(name.encode() + tensor.float().numpy().tobytes())
    assert engine.optimizer is not None
    for inner in (part.optimizer for part in engine.optimizer.chained_optimizers):
        for state in inner.state.values():
            for moment in ("exp_avg", "exp_avg_sq"):
                found.update(state[moment].numpy().tobytes())
    return found.hexdigest()


def build(world: World, game: GameConfig, valid_steps: Sequence[int]) -> tuple[Players, AlignPlan, Renderer]:
    shape, renderer = Qwen3VLShape.from_folder(FOLDER), Renderer.from_folder(FOLDER)
    policy = build_policy(FOLDER, shape, world=world, dtype=torch.float32, optimizer=MINI_ALIGN.policy, total_steps=9)
    discriminator = build_discriminator(MINI_ALIGN, FOLDER, shape, world=world, dtype=torch.float32)
    players = Players(policy, discriminator, Script(renderer, valid_steps))
    players.rollout.update_weights(policy.export_hf(), 0)
    plan = AlignPlan(
        game=game,
        sampling=Sampling(),
        rollouts_per_prompt=ROLLOUTS,
        tokens_per_microbatch=4096,
        load_balance=0.005,
        vocab_size=shape.text.vocab,
        seed=SEED,
        form=batch_format(renderer, world),
    )
    return players, plan, renderer


def scenes(renderer: Renderer, captions_only: Mapping[int, Sequence[int]]) -> Callable[[int], list[Example]]:
    """Prompts by step; those numbered ``captions_only[step]`` have references without reasoning."""
    source = SceneSource(renderer, split="align", seed=SEED, batch_size=PROMPTS)

    def prompts(step: int) -> list[Example]:
        examples = source.batch(step)
        for number in captions_only.get(step, ()):
            reference = examples[number].reference
            alone = replace(reference, segments=replace(reference.segments, reasoning=None))
            examples[number] = replace(examples[number], reference=alone)
        return examples

    return prompts


def play(
    world: World,
    game: GameConfig,
    valid_steps: str,
    captions_only: Mapping[int, Sequence[int]],
    saved: Path,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Rows of all steps as they would stand in ``metrics.jsonl``, and both players' digests: before, after each step.

    ``valid_steps`` has a letter for each step, v where rollouts are valid. ``saved`` is where both players are kept
    after the first step, for rollbacks.
    """
    players, plan, renderer = build(world, game, [step for step, letter in enumerate(valid_steps) if letter == "v"])
    steps, rows = range(len(valid_steps)), list[Row]()
    digests = [(digest(players.policy), digest(players.discriminator))]

    def on_step(step: AlignStep) -> None:
        rows.append(step_row(step, renderer))
        digests.append((digest(players.policy), digest(players.discriminator)))
        if game.rollbacks and step.step == 0:
            checkpoint.save(saved, players.engines(), {}, models={"policy": ModelFiles({})})

    def roll_back() -> None:
        checkpoint.load(saved, players.engines())

    queue = RolloutQueue(
        players.rollout,
        scenes(renderer, captions_only),
        plan.sampling,
        n=ROLLOUTS,
        seed=SEED,
        world=world,
        steps=steps,
        ahead=0,
    )
    memory = GameMemory.fresh(game, seed=SEED)
    align(players, queue, plan, memory, world=world, steps=steps, timers=PhaseTimers(), on_step=on_step,
          roll_back=roll_back)  # fmt: skip
    return rows, digests
