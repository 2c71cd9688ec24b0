"""Makes a mini world's three checkpoints: base, supervised policy, warm-started discriminator.

Recipes and sizes: ``config/experiments/mini_world.py``. Each phase starts from the folder that the one before wrote, so
a phase that is already there is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from model_providers.moe_discriminator.folder import write_config
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.moe_discriminator.upcycle import UpcycledSource
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.architecture.model import ALL_VISION, FAITHFUL_SHARE, MiniWorld
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import (
    MINI_FOLDER,
    MakeMiniConfig,
    SupervisedPhase,
    mini_model_config,
)
from prism_megatron.config.merge import to_plain
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet
from prism_megatron.data.scenes import Split
from prism_megatron.data.stream.prefetch import Demonstration
from prism_megatron.data.teachers import SLOPPY_TEACHER, Teacher
from prism_megatron.data.tokenizer import CONTROL_TOKENS, MODEL_VOCAB_SIZE, save_mini_processing
from prism_megatron.disk import write_atomically
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.errors import PrismError
from prism_megatron.experiments.mini_figures import (
    MAX_RESPONSE_TOKENS,
    OVER_ALL,
    TOKENS_PER_MICROBATCH,
    answers_of,
    replica_of,
    scores_of,
)
from prism_megatron.game import judge
from prism_megatron.game.judge import JudgePlan
from prism_megatron.parallel.collectives import barrier
from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.stages.warm_start.gate import Gate, described, measure
from prism_megatron.stages.warm_start.pairs import StepPairs
from prism_megatron.training.roles import batch_format, build_policy, export_folder
from prism_megatron.training.supervised_update import SFTUpdate, teach
from prism_megatron.types import TOWER_NAMES

SHIPPED = ("base", "policy", "discriminator")
ROWS_PER_MICROBATCH = 16
AUC_PROMPTS = 48
AUC_ROLLOUTS = 8


@dataclass(frozen=True)
class Lesson:
    """Which scenes a phase is taught on, by whom, and whether vision tower and projector learn.

    ``faithful_share`` of what a teacher who errs writes is without a fault.
    """

    scenes: MiniWorld
    split: Split
    teacher: Teacher
    vision: bool
    faithful_share: float = FAITHFUL_SHARE


BASE_LESSONS: dict[MiniWorld, Lesson] = {
    "habits": Lesson("habits", "pretrain", "mild", vision=True),
    "drift": Lesson("drift", "pretrain", "faithful", vision=False),
}


def make_mini(config: MakeMiniConfig) -> None:
    """Write ``base``, ``policy`` and ``discriminator`` under ``config.output``; PrismError below the AUC gate."""
    world = start(ParallelConfig(), seed=config.seed)
    output, scenes = config.output, config.world
    base, policy = output / "base", output / "policy"
    before = MINI_FOLDER / "policy" if scenes == "drift" else output / "init"
    if world.is_main and not before.exists():
        _write_untrained(before, seed=config.seed)
    barrier()
    supervised(config.pretrain, before, base, BASE_LESSONS[scenes], seed=config.seed, world=world)
    sloppy = Lesson(scenes, "sft", SLOPPY_TEACHER[scenes], vision=False)
    supervised(config.sft, base, policy, sloppy, seed=config.seed, world=world)
    # A policy whose counts have drifted sees worse than its base does.
    source = policy if scenes == "habits" else base
    discriminate(config, policy, source, output / "discriminator", world)
    figures = measured(config, output, world) if config.measured_scenes else {}
    if world.is_main:
        write_provenance(config, output, figures)
    stop(world)


def measured(config: MakeMiniConfig, output: Path, world: World) -> dict[str, object]:
    """What the checkpoints do on held-out scenes, which is said too."""
    count, seed = config.measured_scenes, config.seed
    found: dict[str, object] = {}
    for name in ("base", "policy"):
        answers = answers_of(output / name, config.world, count=count, seed=seed, world=world)
        for mode, figures in answers.items():
            text = ", ".join(f"{measure} {value:.3f}" for measure, value in figures.items())
            _say(f"{name}, {mode}, {count} held-out scenes: {text}", world)
        found[name] = answers
    prompts = -(-count // AUC_ROLLOUTS)
    scores = scores_of(
        output / "discriminator", output / "policy", config.world, prompts=prompts, rollouts=AUC_ROLLOUTS, seed=seed,
        world=world,
    )  # fmt: skip
    lengths = ", ".join(f"{name} {scores[f'{name}/{OVER_ALL}']}" for name in TOWER_NAMES)
    _say(f"discriminator, {prompts} held-out prompts: {described(scores)}; r of score and length: {lengths}", world)
    kept = ("auc", "auc_pairs", "accuracy", "pairs", OVER_ALL)
    found["discriminator"] = {name: value for name, value in scores.items() if name.partition("/")[2] in kept}
    return found


def _say(text: str, world: World) -> None:
    if world.is_main:
        print(text, flush=True)


def write_provenance(config: MakeMiniConfig, output: Path, figures: Mapping[str, object]) -> None:
    """What made the weights, what they do, and their hashes: ``provenance.json``."""
    weights = sorted(output.glob("*/*.safetensors"))
    document = {
        "command": "python tools/make_mini.py" + ("" if config.world == "habits" else f" --world {config.world}"),
        "config": {**to_plain(config), "output": output.name},
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers", "tokenizers", "numpy")},
        "sha256": {
            str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in weights
            if path.parent.name in SHIPPED
        },
        "held out": figures,
    }
    write_atomically(output / "provenance.json", json.dumps(document, indent=2) + "\n")


def _write_untrained(folder: Path, *, seed: int) -> None:
    """Random weights of transformers' initialiser beside the mini's tokenizer and preprocessor."""
    from tokenizers import Tokenizer
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    save_mini_processing(aside)
    tokenizer = Tokenizer.from_file(str(aside / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    config = mini_model_config(
        vocab_size=MODEL_VOCAB_SIZE, token_ids={token: vocabulary[token] for token in CONTROL_TOKENS}
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    model.save_pretrained(aside)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def supervised(
    phase: SupervisedPhase, source: Path, target: Path, lesson: Lesson, *, seed: int, world: World,
    stored: torch.dtype = torch.bfloat16, scenes: SceneSource | SceneSet | None = None,
) -> None:  # fmt: skip
    """One supervised phase from ``source`` to ``target``; what ships is stored in bf16.

    The scenes are those of the lesson, unless others are given.
    """
    if target.exists():
        return
    shape, renderer = Qwen3VLShape.from_folder(source), Renderer.from_folder(source)
    policy = build_policy(
        source,
        shape,
        world=world,
        dtype=torch.float32,
        optimizer=phase.optimizer,
        total_steps=phase.steps,
        freeze=() if lesson.vision else ALL_VISION,
    )
    share = phase.rows_per_step // world.dp_size
    source_of = scenes or SceneSource(renderer, split=lesson.split, seed=seed, batch_size=1, teacher=lesson.teacher,
                                      faithful_share=lesson.faithful_share, world=lesson.scenes)  # fmt: skip

    def my_rows(step: int) -> Sequence[Demonstration]:
        first = step * phase.rows_per_step + world.dp_rank * share
        examples = (source_of.example(first + i) for i in range(share))
        return [renderer.training_row(example.prompt, example.reference) for example in examples]

    started = time.monotonic()

    def say(step: int, update: SFTUpdate) -> None:
        if world.is_main and (step % 20 == 0 or step == phase.steps - 1):
            seconds, norm = time.monotonic() - started, update.result.grad_norm
            print(f"{lesson.split} step {step:5}  loss {update.loss:.4f}  grad {norm:.3f}  {seconds:.0f} s", flush=True)

    teach(
        policy,
        my_rows,
        world=world,
        form=batch_format(renderer, world),
        rows_per_microbatch=ROWS_PER_MICROBATCH,
        steps=phase.steps,
        on_step=say,
    )
    export_folder(policy, target, like=source, world=world, dtype=stored)


def discriminate(config: MakeMiniConfig, policy_folder: Path, source: Path, target: Path, world: World) -> None:
    """Upcycle ``source``, warm it up on references against the policy's samples, and gate on held-out AUC.

    Raises PrismError where the gate is missed.
    """
    if target.exists():
        return
    phase, seed = config.warm_start, config.seed
    shape, renderer = Qwen3VLShape.from_folder(policy_folder), Renderer.from_folder(policy_folder)
    towers = Towers()
    discriminator = MegatronEngine(
        name="discriminator",
        provider=DiscriminatorProvider(shape, towers, freeze_vision=True),
        world=world,
        dtype=torch.float32,
        optimizer=phase.optimizer,
        total_steps=phase.steps,
    )
    discriminator.load_hf(UpcycledSource(open_weights(source), shape, towers, seed=seed))
    rollout = replica_of(policy_folder, renderer, world)
    plan = JudgePlan(
        batch_format(renderer, world),
        TOKENS_PER_MICROBATCH,
        score_regulariser=GameConfig().score_regulariser,
        seed=seed,
        load_balance=phase.load_balance,
    )
    sampling = Sampling(max_new_tokens=MAX_RESPONSE_TOKENS)
    scenes = partial(SceneSource, renderer, seed=seed + 1, world=config.world)
    prompts = scenes(split="sft", batch_size=phase.prompts_per_step)
    for step in range(phase.steps):
        asked = prompts.batch(step)
        n = phase.rollouts_per_prompt
        answered = sample_groups(rollout, asked, sampling, n=n, seed=seed, step=step, world=world)
        sums = judge.train(discriminator, answered, plan, world=world, step=step).sums
        if world.is_main and (step % 10 == 0 or step == phase.steps - 1):
            accuracy = [sums[f"{name}/correct"] / max(sums[f"{name}/pairs"], 1.0) for name in TOWER_NAMES]
            loss = sums["discriminator_loss"]
            print(
                f"warm-start step {step:5}  loss {loss:.4f}  accuracy {accuracy[0]:.2f} {accuracy[1]:.2f}", flush=True
            )
    examples = scenes(split="heldout", batch_size=AUC_PROMPTS).batch(0)
    groups = sample_groups(rollout, examples, sampling, n=AUC_ROLLOUTS, seed=seed, step=0, world=world)
    held_out = measure(discriminator, StepPairs(examples, groups), plan, renderer, world=world)
    if world.is_main:
        print(f"held out: {described(held_out)}; gate {config.min_auc}", flush=True)
    problem = Gate(config.min_auc, 0.0, AUC_PROMPTS).problem(held_out)
    if problem is not None:
        raise PrismError(problem)
    like = target.with_name("discriminator-files")
    if world.is_main:
        shutil.copytree(
            policy_folder,
            like,
            ignore=shutil.ignore_patterns("*.safetensors*"),
            copy_function=shutil.copyfile,
            dirs_exist_ok=True,
        )
        write_config(like, dense_folder=policy_folder, variant=Variant(towers))
    barrier()
    export_folder(discriminator, target, like=like, world=world, dtype=torch.bfloat16)
