"""What ranks run to play whole steps of the game on the mini's models with scripted rollouts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from prism_megatron.config.stages.exam import ExamConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.conversion.checkpoints.folder import ModelFiles
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.data.identity import Identity
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.teachers import write
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.game.judge import JudgePlan
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.run.checkpoints import Checkpoints
from prism_megatron.run.exports import Exports
from prism_megatron.run.session import Session
from prism_megatron.sampling.build import build_exam
from prism_megatron.sampling.handover import Handover
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.sampling.rewarding import reward
from prism_megatron.stages.align.plan import AlignPlan, Players, Prompts
from prism_megatron.stages.align.stage import Alignment
from prism_megatron.training.roles import batch_format
from prism_megatron.types import Rollout, VersionSpan
from tests.mini_players import FOLDER, mini_discriminator, mini_policy, update_plan

PROMPTS, ROLLOUTS, SEED = 2, 3, 5
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

    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        found = [
            tuple(self._answer(request.step, request.prompt_offset + p, sample) for sample in numbers)
            for p, numbers in enumerate(request.wanted)
        ]
        if request.finished is not None:
            for place, answers in enumerate(found):
                request.finished(place, answers)
        return found

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


def build(
    world: World, game: GameConfig, valid_steps: str, captions_only: Mapping[int, Sequence[int]], exam_prompts: int = 0
) -> Alignment:
    """The stage with an engine that answers from a script; ``valid_steps`` has a letter for each step.

    Held-out scenes are asked in every second step, if any are: the engine answers them as those of step 0.
    """
    renderer, steps = Renderer.from_folder(FOLDER), len(valid_steps)
    policy, discriminator = mini_policy(world, steps=9), mini_discriminator(world)
    rollout = Script(renderer, [step for step, letter in enumerate(valid_steps) if letter == "v"])
    prompts = ScriptedScenes(SceneSource(renderer, split="align", seed=SEED, batch_size=PROMPTS), captions_only)
    queue = RolloutQueue(
        rollout, prompts.batch, Sampling(), n=ROLLOUTS, seed=SEED, world=world, steps=range(steps), ahead=0
    )
    form = batch_format(renderer, world)
    judging = JudgePlan(
        form,
        4096,
        score_regulariser=game.score_regulariser,
        seed=SEED,
        load_balance=0.005,
        updates_per_step=game.discriminator_updates_per_step,
    )
    rewarder, held_out = Rewarder(RewardsConfig()), SceneSource(renderer, split="heldout", seed=SEED, batch_size=1)
    exam = build_exam(
        ExamConfig(eval_every=2, eval_rollouts=ROLLOUTS),
        [held_out.example(number) for number in range(exam_prompts)],
        rollout,
        Sampling(),
        partial(reward, rewarder, renderer),
        seed=SEED,
        steps=steps,
        save_every=100,
        world=world,
    )
    return Alignment(
        Players(policy, discriminator, rollout, queue, Handover(policy, rollout), rewarder),
        AlignPlan(game, judging, update_plan(form, tokens=4096), seed=SEED, steps=steps),
        Prompts(prompts, exam=exam),
        Exports({"policy": ModelFiles({})}, title="", trained="", renderer=renderer),
        Session(world, Path(), quiet=True),
    )


@dataclass(frozen=True)
class ScriptedScenes:
    """Prompts by step; those numbered ``captions_only[step]`` have references without reasoning."""

    source: SceneSource
    captions_only: Mapping[int, Sequence[int]]

    counts = None

    @property
    def identity(self) -> Identity:
        return self.source.identity

    def batch(self, step: int) -> list[Example]:
        examples = self.source.batch(step)
        for number in self.captions_only.get(step, ()):
            reference = examples[number].reference
            alone = replace(reference, segments=replace(reference.segments, reasoning=None))
            examples[number] = replace(examples[number], reference=alone)
        return examples


def play(
    world: World,
    game: GameConfig,
    valid_steps: str,
    captions_only: Mapping[int, Sequence[int]],
    saved: Path,
    *,
    exam_prompts: int = 0,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Rows of all steps as they would stand in ``metrics.jsonl``, and both players' digests: before, after each step.

    ``valid_steps`` has a letter for each step, v where rollouts are valid. ``saved`` is where both players are kept
    after the first step, for rollbacks.
    """
    stage = build(world, game, valid_steps, captions_only, exam_prompts)
    players, checkpoints, rows = stage.players, Checkpoints(saved), list[Row]()
    stage.session.checkpoints = checkpoints
    stage.prepare(0)
    digests = [(digest(players.policy), digest(players.discriminator))]
    for step in range(len(valid_steps)):
        outcome = stage.play(step)
        rows.append(dict(outcome.row))
        digests.append((digest(players.policy), digest(players.discriminator)))
        if game.rollbacks and step == 0:
            checkpoints.save(stage, 1, seed=SEED, good=True)
        if outcome.verdict == "stop":
            break
    stage.close()
    return rows, digests
