"""Does alignment do what it claims on scenes, and more than its controls? Several seeds, four arms, one table.

Arms: ``aligned``; ``lr0`` (the policy is never updated); ``random`` (the discriminator stays at random weights);
``shuffled`` (scores lose their owners inside each group). An effect counts only where it beats every control.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.upcycle import keyed_normal
from prism_megatron.config.align import AlignConfig
from prism_megatron.config.effect import EffectConfig
from prism_megatron.config.mini_world import MINI_FOLDER
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.conversion.open_source import open_weights
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.evaluation.bootstrap import mean_interval
from prism_megatron.evaluation.scenes import SceneJudgement
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.rollout.base import Sampling
from prism_megatron.stages.align import AlignPlan, AlignStep, Players, align
from prism_megatron.stages.align_metrics import item_accuracy
from prism_megatron.stages.assembly import batch_format, build_policy, build_rollout
from prism_megatron.stages.evaluate import heldout_scenes, judge_scenes
from prism_megatron.stages.game_memory import GameMemory
from prism_megatron.stages.game_metrics import game_row, rights_of
from prism_megatron.stages.rollout_queue import RolloutQueue

ARMS = ("aligned", "lr0", "random", "shuffled")
CONTROLS = ARMS[1:]
MODES = ("T=1", "greedy")
MEASURES: dict[str, Callable[[SceneJudgement], float]] = {
    "item accuracy": item_accuracy,
    "caption exact": lambda one: float(one.caption_exact),
    "step validity": lambda one: one.step_validity,
    "reasoning exact": lambda one: float(one.reasoning_exact),
    "answer right": lambda one: float(one.answer_right),
}
RANDOM_STD = 0.05


Table = dict[str, dict[str, np.ndarray]]
"""Per mode and measure: one value per (seed, scene), float64 ``[seeds, scenes]``."""


@dataclass(frozen=True, eq=False)
class RandomSource(TensorSource):
    """Fresh weights with the names and shapes of ``like``: norms 1, everything else N(0, 0.05²), keyed by the seed."""

    like: TensorSource
    seed: int

    def names(self) -> Sequence[str]:
        return self.like.names()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.like.shapes()

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(self.like.names(), torch.float32)

    def get(self, name: str) -> torch.Tensor:
        shape = self.like.shapes()[name]
        if "norm" in name:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return keyed_normal(shape, std=RANDOM_STD, seed=self.seed, name=name)


def measure_effect(config: EffectConfig, recipe: AlignConfig) -> None:
    """Run every arm and seed in one world and write ``effect.json`` and ``effect.md`` under ``config.output``."""
    world = start(recipe.parallel, seed=recipe.seed)
    folder = MINI_FOLDER / "policy"
    renderer = Renderer.from_folder(folder)
    examples = heldout_scenes(renderer, count=config.scenes, seed=0)
    before: list[dict[str, Sequence[SceneJudgement]]] = []
    after: dict[str, list[dict[str, Sequence[SceneJudgement]]]] = {arm: [] for arm in ARMS}
    games: dict[str, list[dict[str, float | int | None]]] = {arm: [] for arm in ARMS}
    evaluate = partial(_evaluate, max_new_tokens=recipe.data.max_response_tokens, world=world)
    started = time.monotonic()
    for seed in range(config.seeds):
        for arm in ARMS:
            players, plan, prompts = _set_up(arm, folder, renderer, config, recipe, seed=seed, world=world)
            if arm == ARMS[0]:
                before.append(evaluate(players, examples, renderer, seed=seed))
            rows: list[dict[str, float | int | None]] = []

            def keep(step: AlignStep, rows: list[dict[str, float | int | None]] = rows) -> None:
                rows.append(game_row(step.groups, step.judgement, rights_of(step.examples, step.groups, renderer)))

            steps = range(config.steps)
            queue = RolloutQueue(players.rollout, prompts.batch, plan.sampling, n=plan.rollouts_per_prompt,
                                 seed=plan.seed, world=world, steps=steps, ahead=0)  # fmt: skip
            memory = GameMemory.fresh(plan.game, seed=seed)
            align(players, queue, plan, memory, world=world, steps=steps, timers=PhaseTimers(), on_step=keep)
            after[arm].append(evaluate(players, examples, renderer, seed=seed))
            games[arm].append(rows[-1])
            if world.is_main:
                print(f"seed {seed} {arm}: done after {time.monotonic() - started:.0f} s", flush=True)
    if world.is_main:
        _write(config, tabulate(before), {arm: tabulate(runs) for arm, runs in after.items()}, games)
    stop(world)


def _set_up(
    arm: str,
    folder: Path,
    renderer: Renderer,
    config: EffectConfig,
    recipe: AlignConfig,
    *,
    seed: int,
    world: World,
) -> tuple[Players, AlignPlan, SceneSource]:
    shape = Qwen3VLShape.from_folder(folder)
    policy = build_policy(
        folder, shape, world=world, dtype=torch.float32, optimizer=recipe.policy, total_steps=config.steps
    )
    weights = open_weights(MINI_FOLDER / "discriminator")
    discriminator = MegatronEngine(
        name="discriminator",
        provider=DiscriminatorProvider.from_folder(MINI_FOLDER / "discriminator"),
        world=world,
        dtype=torch.float32,
        optimizer=recipe.discriminator_optimizer,
        total_steps=config.steps,
    )
    discriminator.load_hf(RandomSource(weights, seed) if arm == "random" else weights)
    rollout = build_rollout(folder, renderer, world=world, dtype=torch.float32)
    rollout.update_weights(policy.export_hf(), version=0)
    plan = AlignPlan(
        game=replace(
            recipe.game,
            freeze_policy=arm == "lr0",
            freeze_discriminator=arm == "random",
            shuffle_scores=arm == "shuffled",
        ),
        sampling=Sampling(temperature=1.0, max_new_tokens=recipe.data.max_response_tokens),
        rollouts_per_prompt=recipe.rollout.rollouts_per_prompt,
        tokens_per_microbatch=recipe.tokens_per_microbatch,
        load_balance=recipe.discriminator.load_balance or 0.0,
        vocab_size=shape.text.vocab,
        seed=seed,
        form=batch_format(renderer, world, share_prompts=True),
    )
    prompts = SceneSource(renderer, split="align", seed=seed, batch_size=recipe.rollout.prompts_per_step)
    return Players(policy, discriminator, rollout), plan, prompts


def _evaluate(
    players: Players, examples: Sequence[Example], renderer: Renderer, *, max_new_tokens: int, seed: int, world: World
) -> dict[str, Sequence[SceneJudgement]]:
    temperatures = dict(zip(MODES, (1.0, 0.0), strict=True))
    return {
        mode: judge_scenes(
            players.rollout,
            examples,
            renderer,
            Sampling(temperature=t, max_new_tokens=max_new_tokens),
            seed=seed,
            world=world,
        )
        for mode, t in temperatures.items()
    }


def tabulate(runs: Sequence[Mapping[str, Sequence[SceneJudgement]]]) -> Table:
    """Judgements of several seeds as arrays ``[seeds, scenes]`` per mode and measure."""

    return {
        mode: {
            measure: np.array([[read(one) for one in run[mode]] for run in runs]) for measure, read in MEASURES.items()
        }
        for mode in MODES
    }


def change(after: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Mean paired change with its 95 % bootstrap interval; scenes are resampled, seeds averaged within a scene."""
    mean, low, high = mean_interval((after - before).mean(axis=0), seed=0)
    return {"mean": mean, "low": low, "high": high}


def _write(
    config: EffectConfig,
    before: Table,
    after: Mapping[str, Table],
    games: Mapping[str, Sequence[Mapping[str, float | int | None]]],
) -> None:
    result: dict[str, object] = {
        "seeds": config.seeds,
        "steps": config.steps,
        "scenes": config.scenes,
        "last_step": games,
    }
    title = f"Alignment on {config.scenes} held-out scenes, {config.seeds} seeds, {config.steps} steps"
    lines = [
        f"{title}; mean and 95 % bootstrap interval over scenes.",
        "",
        "| sampling | measure | before | "
        + " | ".join(ARMS)
        + " | aligned − control (the weakest of three) | effect |",
        "|---" * (5 + len(ARMS)) + "|",
    ]
    for mode in MODES:
        for measure in MEASURES:
            start_mean, start_low, start_high = mean_interval(before[mode][measure].mean(axis=0), seed=0)
            cells = {arm: mean_interval(after[arm][mode][measure].mean(axis=0), seed=0) for arm in ARMS}
            margins = {arm: change(after["aligned"][mode][measure], after[arm][mode][measure]) for arm in CONTROLS}
            weakest = min(margins.values(), key=lambda margin: margin["low"])
            result[f"{mode}/{measure}"] = {
                "before": [start_mean, start_low, start_high],
                **{arm: list(cell) for arm, cell in cells.items()},
                "aligned_minus_before": change(after["aligned"][mode][measure], before[mode][measure]),
                "aligned_minus_control": margins,
            }
            lines.append(
                f"| {mode} | {measure} | {_cell(start_mean, start_low, start_high)} | "
                + " | ".join(_cell(*cells[arm]) for arm in ARMS)
                + f" | {_cell(weakest['mean'], weakest['low'], weakest['high'])} | "
                + ("yes |" if weakest["low"] > 0 else "no |")
            )
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "effect.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(lines) + "\n"
    (config.output / "effect.md").write_text(table, encoding="utf-8")
    print(table, flush=True)


def _cell(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
