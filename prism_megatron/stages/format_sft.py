"""A short supervised phase on a record set's training part, so that answers about its images have the asked format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from prism_megatron.config.align import AlignConfig
from prism_megatron.config.optimizer import OptimizerConfig
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.data.loader import ExampleSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.stages.assembly import batch_format, build_policy, export_folder
from prism_megatron.stages.sft import Demonstration, SFTStep, train


def teach_format(
    config: AlignConfig,
    *,
    source: Path,
    target: Path,
    shape: Qwen3VLShape,
    renderer: Renderer,
    prompts: ExampleSource,
    world: World,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> None:
    """Train on references for ``--format-sft`` steps from ``source`` and write the policy to ``target``.

    The vision tower and projector stay frozen. Steps take as many records as the game takes prompts.
    """
    steps = config.data.format_sft
    optimizer = OptimizerConfig(
        lr=config.data.format_sft_lr, schedule="cosine", min_lr_ratio=0.05, warmup_steps=max(1, steps // 20)
    )
    policy = build_policy(
        source, shape, world=world, dtype=dtype, optimizer=optimizer, total_steps=steps, freeze_vision=True
    )

    def my_rows(step: int) -> Sequence[Demonstration]:
        examples = prompts.batch(step)[world.dp_rank :: world.dp_size]
        return [renderer.training_row(example.prompt, example.reference) for example in examples]

    def report(result: SFTStep) -> None:
        if result.step % 10 == 0 or result.step == steps - 1:
            say(f"format SFT step {result.step + 1}/{steps}: loss {result.loss:.4f} on {result.label_tokens} tokens")

    train(
        policy,
        my_rows,
        world=world,
        form=batch_format(shape, renderer, world),
        vocab_size=shape.text.vocab,
        rows_per_microbatch=max(1, config.rollout.prompts_per_step // world.dp_size),
        steps=steps,
        on_step=report,
    )
    export_folder(policy, target, like=source, world=world)
