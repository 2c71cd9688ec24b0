"""A short supervised phase on a record set's training part, so that answers about its images have the asked format.

It teaches the format and little else: references are abridged to the first line of the caption and the last line of
the reasoning, because a small model cannot learn a new domain's text in a few steps, and need not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.data.loader import Example, ExampleSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.stream.prefetch import Demonstration
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.runtime import World
from prism_megatron.observability.activity import Activity
from prism_megatron.training.roles import batch_format, build_policy, export_folder
from prism_megatron.training.supervised_update import SFTUpdate, teach
from prism_megatron.types import Response

FORMAT_SFT = "format_sft"
"""Folder, inside the run's, of the policy after ``--format-sft``."""


def teach_format(
    data: DataConfig,
    *,
    source: Path,
    target: Path,
    shape: Qwen3VLShape,
    renderer: Renderer,
    prompts: ExampleSource,
    prompts_per_step: int,
    world: World,
    dtype: torch.dtype,
    execution: Execution,
    say: Callable[[str], None],
    activity: Activity | None = None,
) -> None:
    """Train for ``--format-sft`` steps from ``source`` and write the policy to ``target``.

    The vision tower and projector stay frozen. A step takes ``prompts_per_step`` records. The schedule is
    cosine to zero with the paper's warm-up ratio of 0.1. ``activity`` is told how far it is.
    """
    steps = data.format_sft
    optimizer = OptimizerConfig(
        lr=data.format_sft_lr, schedule="cosine", min_lr_ratio=0.0, warmup_steps=steps // 10, beta2=0.95
    )
    policy = build_policy(
        source,
        shape,
        world=world,
        dtype=dtype,
        optimizer=optimizer,
        total_steps=steps,
        freeze=ALL_VISION,
        execution=execution,
    )

    def my_rows(step: int) -> Sequence[Demonstration]:
        examples = prompts.batch(step)[world.dp_rank :: world.dp_size]
        return [renderer.training_row(example.prompt, abridged(example, renderer)) for example in examples]

    def report(step: int, update: SFTUpdate) -> None:
        advance(1)
        if step % 10 == 0 or step == steps - 1:
            say(f"format SFT step {step + 1}/{steps}: loss {update.loss:.4f} on {update.label_tokens} tokens")

    activity = activity or Activity()
    policy.activity = activity
    with activity.phase("format SFT"), activity.task("steps", total=steps) as advance:
        teach(
            policy,
            my_rows,
            world=world,
            form=batch_format(renderer, world, execution),
            rows_per_microbatch=max(1, prompts_per_step // world.dp_size),
            steps=steps,
            on_step=report,
        )
    export_folder(policy, target, like=files_folder(source, "policy"), world=world)


def abridged(example: Example, renderer: Renderer) -> Response:
    """The record's reference cut to one line of caption and one of reasoning; its answer stands in for no reasoning."""
    record = example.record
    assert record is not None and record.caption is not None, "format SFT takes records with references"
    reasoning = record.answer if record.solution is None else record.solution.strip().splitlines()[-1]
    return renderer.response(record.caption.strip().splitlines()[0], reasoning, record.answer, id=record.id)
