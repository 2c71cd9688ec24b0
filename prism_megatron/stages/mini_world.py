"""Makes the mini world's three checkpoints: base, supervised policy, warm-started discriminator.

Recipe and sizes: ``config/mini_world.py``. Each phase starts from the folder that the one before wrote, so a phase
that is already there is not run again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.upcycle import UpcycledSource
from prism_megatron.config.game import GameConfig
from prism_megatron.config.mini_world import MakeMiniConfig, SupervisedPhase, mini_model_config
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.hf_reader import HFFolder
from prism_megatron.conversion.hf_writer import write_hf_folder
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import Split
from prism_megatron.data.teachers import Teacher
from prism_megatron.data.tokenizer import CONTROL_TOKENS, MODEL_VOCAB_SIZE, save_mini_processing
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.errors import PrismError
from prism_megatron.evaluation.auc import AUC, within_group_auc
from prism_megatron.evaluation.scenes import judge
from prism_megatron.rollout.base import Sampling
from prism_megatron.stages.assembly import batch_format, build_policy, build_rollout
from prism_megatron.stages.batches import TOWERS
from prism_megatron.stages.judge import Judgement
from prism_megatron.stages.sft import Demonstration, SFTStep, train
from prism_megatron.stages.warm_start import warm_start
from prism_megatron.types import RolloutGroup

MAX_RESPONSE_TOKENS = 96
ROWS_PER_MICROBATCH = 16
AUC_PROMPTS = 48
AUC_ROLLOUTS = 8
FAITHFUL_SHARE = 0.25


def make_mini(config: MakeMiniConfig) -> None:
    """Write ``base``, ``policy`` and ``discriminator`` under ``config.output``. Raises PrismError below the AUC gate."""
    world = start(ParallelConfig(), seed=config.seed)
    output = config.output
    if world.is_main and not (output / "init").exists():
        _write_untrained(output / "init", seed=config.seed)
    dist.barrier()
    supervised(config.pretrain, output / "init", output / "base", "pretrain", "mild", config.seed, world)
    supervised(config.sft, output / "base", output / "policy", "sft", "sloppy", config.seed, world)
    discriminate(config, output / "policy", output / "discriminator", world)
    stop(world)


def _write_untrained(folder: Path, *, seed: int) -> None:
    """Random weights of transformers' initialiser beside the mini's tokenizer and preprocessor."""
    from tokenizers import Tokenizer
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    save_mini_processing(aside)
    tokenizer = Tokenizer.from_file(str(aside / "tokenizer.json"))
    config = mini_model_config(
        vocab_size=MODEL_VOCAB_SIZE, token_ids={token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    model.save_pretrained(aside)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def supervised(
    phase: SupervisedPhase, source: Path, target: Path, split: Split, teacher: Teacher, seed: int, world: World
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
        freeze_vision=split == "sft",
    )
    share = phase.rows_per_step // world.dp_size
    scenes = SceneSource(
        renderer, split=split, seed=seed, batch_size=1, teacher=teacher, faithful_share=FAITHFUL_SHARE
    )

    def my_rows(step: int) -> Sequence[Demonstration]:
        first = step * phase.rows_per_step + world.dp_rank * share
        examples = (scenes.example(first + i) for i in range(share))
        return [renderer.training_row(example.prompt, example.reference) for example in examples]

    started = time.monotonic()

    def say(result: SFTStep) -> None:
        if world.is_main and (result.step % 20 == 0 or result.step == phase.steps - 1):
            seconds = time.monotonic() - started
            print(f"{split:9} step {result.step:5}  loss {result.loss:.4f}  grad {result.grad_norm:.3f}  {seconds:.0f} s")

    train(
        policy,
        my_rows,
        world=world,
        form=batch_format(shape, renderer, world),
        vocab_size=shape.text.vocab,
        rows_per_microbatch=ROWS_PER_MICROBATCH,
        steps=phase.steps,
        on_step=say,
    )
    _export(policy, source, target, world)


def discriminate(config: MakeMiniConfig, policy_folder: Path, target: Path, world: World) -> None:
    """Upcycle the supervised policy, warm it up on references against its samples, and gate on held-out AUC."""
    if target.exists():
        return
    phase, seed = config.warm_start, config.seed
    shape, renderer = Qwen3VLShape.from_folder(policy_folder), Renderer.from_folder(policy_folder)
    provider = DiscriminatorProvider(shape, freeze_vision=True)
    discriminator = MegatronEngine(
        name="discriminator",
        provider=provider,
        world=world,
        dtype=torch.float32,
        optimizer=phase.optimizer,
        total_steps=phase.steps,
    )
    discriminator.load_hf(UpcycledSource(HFFolder(policy_folder), provider, seed=seed))
    rollout = build_rollout(policy_folder, renderer, world=world, dtype=torch.float32)
    source = HFFolder(policy_folder)
    rollout.update_weights(((name, source.get(name)) for name in source.names()), version=0)
    sampling = Sampling(max_new_tokens=MAX_RESPONSE_TOKENS)
    form = batch_format(shape, renderer, world)
    measured: list[list[list[tuple[float, bool]]]] = [[] for _ in TOWERS]

    def say(step: int, _examples: Sequence[Example], _groups: Sequence[RolloutGroup], judgement: Judgement) -> None:
        if world.is_main and (step % 10 == 0 or step == phase.steps - 1):
            pairs = max(judgement.sums["perception/pairs"], 1.0)
            accuracy = [judgement.sums[f"{tower}/correct"] / pairs for tower in ("perception", "reasoning")]
            print(f"warmstart step {step:5}  loss {judgement.sums['discriminator_loss']:.4f}  "
                  f"accuracy {accuracy[0]:.2f} / {accuracy[1]:.2f}")  # fmt: skip

    def measure(
        _step: int, examples: Sequence[Example], groups: Sequence[RolloutGroup], judgement: Judgement
    ) -> None:
        for tower in TOWERS:
            measured[tower] += scored_against_truth(tower, examples, groups, judgement, renderer)

    fixed = GameConfig(freeze_discriminator=True)
    for game, steps, split, size, n, hook in (
        (GameConfig(load_balance=phase.load_balance), phase.steps, "sft", phase.prompts_per_step, phase.rollouts_per_prompt, say),
        (fixed, 1, "heldout", AUC_PROMPTS, AUC_ROLLOUTS, measure),
    ):
        prompts = SceneSource(renderer, split=split, seed=seed + 1, batch_size=size)  # type: ignore[arg-type]
        warm_start(discriminator, rollout, prompts.batch, sampling, game, world=world, form=form,
                   rollouts_per_prompt=n, groups_per_batch=4, steps=range(steps), seed=seed, on_step=hook)  # fmt: skip

    auc = [within_group_auc(groups) for groups in measured]
    if world.is_main:
        print(f"held-out AUC: perception {_show(auc[0])}, reasoning {_show(auc[1])}; gate {config.min_auc}")
    if any(tower.value is None or tower.value < config.min_auc for tower in auc):
        raise PrismError(
            f"the discriminator's held-out AUC is {_show(auc[0])} / {_show(auc[1])}, below --min-auc {config.min_auc}; "
            "train it longer or lower the gate"
        )
    _export(discriminator, policy_folder, target, world, config=provider.hf_config(policy_folder))
