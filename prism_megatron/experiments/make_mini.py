"""Makes the mini world's three checkpoints: base, supervised policy, warm-started discriminator.

Recipe and sizes: ``config/experiments/mini_world.py``. Each phase starts from the folder that the one before wrote, so
a phase that is already there is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from model_providers.moe_discriminator.folder import write_config
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.moe_discriminator.upcycle import UpcycledSource
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MakeMiniConfig, SupervisedPhase, mini_model_config
from prism_megatron.config.merge import to_plain
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.conversion.open_source import open_weights
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import Split
from prism_megatron.data.stream.prefetch import Demonstration
from prism_megatron.data.teachers import Teacher
from prism_megatron.data.tokenizer import CONTROL_TOKENS, MODEL_VOCAB_SIZE, save_mini_processing
from prism_megatron.disk import write_atomically
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.errors import PrismError
from prism_megatron.game import judge
from prism_megatron.game.judge import JudgePlan
from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling.replicas import build_replica
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.stages.warm_start.gate import Gate, described, measure
from prism_megatron.stages.warm_start.pairs import StepPairs
from prism_megatron.training.roles import batch_format, build_policy, export_folder
from prism_megatron.training.supervised_update import SFTUpdate, teach
from prism_megatron.types import TOWER_NAMES

SHIPPED = ("base", "policy", "discriminator")
MAX_RESPONSE_TOKENS = 96
ROWS_PER_MICROBATCH = 16
TOKENS_PER_MICROBATCH = 4096
AUC_PROMPTS = 48
AUC_ROLLOUTS = 8
FAITHFUL_SHARE = 0.25


def make_mini(config: MakeMiniConfig) -> None:
    """Write ``base``, ``policy`` and ``discriminator`` under ``config.output``; PrismError below the AUC gate."""
    world = start(ParallelConfig(), seed=config.seed)
    output = config.output
    if world.is_main and not (output / "init").exists():
        _write_untrained(output / "init", seed=config.seed)
    dist.barrier()
    teach = partial(supervised, seed=config.seed, world=world)
    teach(config.pretrain, output / "init", output / "base", split="pretrain", teacher="mild")
    teach(config.sft, output / "base", output / "policy", split="sft", teacher="sloppy")
    discriminate(config, output / "policy", output / "discriminator", world)
    if world.is_main:
        write_provenance(config, output)
    stop(world)


def write_provenance(config: MakeMiniConfig, output: Path) -> None:
    """What made the weights, and their hashes: ``provenance.json``."""
    weights = sorted(output.glob("*/*.safetensors"))
    document = {
        "command": "python tools/make_mini.py",
        "config": {**to_plain(config), "output": output.name},
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers", "tokenizers", "numpy")},
        "sha256": {
            str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in weights
            if path.parent.name in SHIPPED
        },
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
    phase: SupervisedPhase, source: Path, target: Path, *, split: Split, teacher: Teacher, seed: int, world: World
) -> None:
    """One supervised phase from ``source`` to ``target``; the projector and vision tower stay frozen in ``sft``."""
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
        freeze=ALL_VISION if split == "sft" else (),
    )
    share = phase.rows_per_step // world.dp_size
    scenes = SceneSource(renderer, split=split, seed=seed, batch_size=1, teacher=teacher, faithful_share=FAITHFUL_SHARE)

    def my_rows(step: int) -> Sequence[Demonstration]:
        first = step * phase.rows_per_step + world.dp_rank * share
        examples = (scenes.example(first + i) for i in range(share))
        return [renderer.training_row(example.prompt, example.reference) for example in examples]

    started = time.monotonic()

    def say(step: int, update: SFTUpdate) -> None:
        if world.is_main and (step % 20 == 0 or step == phase.steps - 1):
            seconds, norm = time.monotonic() - started, update.result.grad_norm
            print(f"{split} step {step:5}  loss {update.loss:.4f}  grad {norm:.3f}  {seconds:.0f} s", flush=True)

    teach(
        policy,
        my_rows,
        world=world,
        form=batch_format(renderer, world),
        rows_per_microbatch=ROWS_PER_MICROBATCH,
        steps=phase.steps,
        on_step=say,
    )
    # What ships is stored in bf16.
    export_folder(policy, target, like=source, world=world, dtype=torch.bfloat16)


def discriminate(config: MakeMiniConfig, policy_folder: Path, target: Path, world: World) -> None:
    """Upcycle the supervised policy, warm it up on references against its samples, and gate on held-out AUC.

    Raises PrismError where the gate is missed.
    """
    if target.exists():
        return
    phase, seed = config.warm_start, config.seed
    shape, renderer = Qwen3VLShape.from_folder(policy_folder), Renderer.from_folder(policy_folder)
    weights, towers = open_weights(policy_folder), Towers()
    discriminator = MegatronEngine(
        name="discriminator",
        provider=DiscriminatorProvider(shape, towers, freeze_vision=True),
        world=world,
        dtype=torch.float32,
        optimizer=phase.optimizer,
        total_steps=phase.steps,
    )
    discriminator.load_hf(UpcycledSource(weights, shape, towers, seed=seed))
    rollout = build_replica(policy_folder, renderer, world=world, dtype=torch.float32)
    rollout.update_weights(((name, weights.get(name)) for name in weights.names()), version=0)
    plan = JudgePlan(
        batch_format(renderer, world),
        TOKENS_PER_MICROBATCH,
        score_regulariser=GameConfig().score_regulariser,
        seed=seed,
        load_balance=phase.load_balance,
    )
    sampling = Sampling(max_new_tokens=MAX_RESPONSE_TOKENS)
    prompts = SceneSource(renderer, split="sft", seed=seed + 1, batch_size=phase.prompts_per_step)
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
    examples = SceneSource(renderer, split="heldout", seed=seed + 1, batch_size=AUC_PROMPTS).batch(0)
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
    dist.barrier()
    export_folder(discriminator, target, like=like, world=world, dtype=torch.bfloat16)
