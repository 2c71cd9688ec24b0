"""Builds a policy, shows it questions with and without their images, and writes what that did to its words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.tools.visual_reliance import VisualRelianceConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.model_names import policy_folder
from prism_megatron.disk import write_atomically, writing
from prism_megatron.engine.runtime import World
from prism_megatron.errors import DataError
from prism_megatron.parallel.collectives import broadcast_object, on_main
from prism_megatron.stages.visual_reliance.asked import Questions
from prism_megatron.training.prompts import renderer_of
from prism_megatron.training.roles import batch_format, build_policy, resolve_dtype
from prism_megatron.training.visual_reliance import Reliance, visual_reliance


def measure_on(world: World, config: VisualRelianceConfig) -> dict[str, Reliance]:
    """Print the figures, and write them to ``--output``; equal on every rank.

    Raises PrismError for a policy or questions that cannot be read, and where no question is left.
    """
    folder = broadcast_object(policy_folder(config.model), source=0)
    shape = Qwen3VLShape.from_folder(files_folder(folder, "policy"))
    renderer = renderer_of(files_folder(folder, "policy"), config.as_trained)
    questions = Questions(config, renderer)
    policy = build_policy(
        folder, shape, world=world, dtype=resolve_dtype(config.dtype, shape), optimizer=None, total_steps=1
    )
    found = visual_reliance(
        policy,
        questions,
        form=batch_format(renderer, world),
        tokens_per_microbatch=config.tokens_per_microbatch,
        world=world,
        seed=config.seed,
    )
    if not found:
        raise DataError(f"no question is left: {_left_out(questions.left_out)}")
    on_main(partial(_tell, config, found, questions.left_out))
    return found


def lines_of(found: Mapping[str, Reliance]) -> list[str]:
    """A table of text."""
    lines = [f"{'nats a token':<12} {'responses':>9} {'tokens':>8} {'image':>8} {'blank':>8}   difference"]
    for segment, own in found.items():
        mean, low, high = own.difference
        lines.append(
            f"{segment:<12} {own.responses:>9} {own.tokens:>8} {own.seen:>8.3f} {own.blank:>8.3f}   "
            f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        )
    return lines


def _tell(config: VisualRelianceConfig, found: Mapping[str, Reliance], left_out: Mapping[str, int]) -> None:
    for line in lines_of(found):
        print(line, flush=True)
    if any(left_out.values()):
        print(f"left out: {_left_out(left_out)}", flush=True)
    if config.output is not None:
        figures: dict[str, Any] = {
            segment: asdict(own) | {"difference": own.difference._asdict()} for segment, own in found.items()
        }
        with writing(config.output):
            config.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"model": config.model, "segments": figures, "left_out": dict(left_out)}, indent=1)
            write_atomically(config.output, text + "\n")


def _left_out(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "there were none"
