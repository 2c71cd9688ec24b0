"""``prism-verify`` on every rank: transformers' model on rank 0, then ours on all, on the same samples.

A discriminator folder is held against ``parity/discriminator.py`` instead, scores in place of logits.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model_providers.moe_discriminator.folder import is_discriminator, read_variant
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.tools.verify import VerifyConfig, model_name
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.parity.by_layer import compare_by_layer
from prism_megatron.parity.compare import FP32, Difference, Outcome, Tolerance, bf16_tolerance, difference
from prism_megatron.parity.discriminator import load_plain_discriminator, plain_outcome
from prism_megatron.parity.discriminator_ranks import build_discriminator, run_discriminator
from prism_megatron.parity.oracle import load_transformers, transformers_outcome
from prism_megatron.parity.probe import Sample
from prism_megatron.parity.prompts import prompted_samples
from prism_megatron.parity.ranks import build_engine, num_microbatches, run_samples
from prism_megatron.parity.report import Report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(config: VerifyConfig) -> None:
    """One rank's work; rank 0 prints, and ends with status 1 where the models differ."""
    world = start(config.parallel, seed=0)
    try:
        report = verify(world, config)
    finally:
        stop(world)
    if report is None:
        return
    print(report.text(), flush=True)
    if config.json:
        print(report.as_json(), flush=True)
    if not report.ok:
        sys.exit(1)


def verify(world: World, config: VerifyConfig) -> Report | None:
    """The comparison that ``config`` asks for, on all ranks; rank 0 has the report."""
    folder = Path(model_name(config))
    shape = Qwen3VLShape.from_folder(folder)
    samples = prompted_samples(folder, config.image, world.dp_size * num_microbatches(world.parallel))
    variant = read_variant(folder) if is_discriminator(folder) else None
    if variant is not None:
        found = _discriminator(world, config, folder, shape, variant, samples)
    else:
        found = (_by_layer if config.by_layer else _whole)(world, config, folder, shape, samples)
    peak_bytes = max(all_gather_objects(_peak_bytes(world)))
    if found is None:
        return None
    return Report(
        mode="layer by layer" if config.by_layer else "whole model",
        output="logits" if variant is None else "scores",
        layout={**world.layout, "vpp": world.parallel.vpp, "sp": int(_sequence_parallel(world, shape, variant))},
        options=_options(config),
        dtype=config.dtype,
        packing="packed" if config.pack and not config.by_layer else "padded",
        num_samples=len(samples),
        num_tokens=sum(len(sample.row.token_ids) for sample in samples),
        num_images=sum(len(sample.row.images) for sample in samples),
        difference=found.difference,
        tolerance=found.tolerance,
        spread=found.spread,
        peak_bytes=peak_bytes,
    )


def _sequence_parallel(world: World, shape: Qwen3VLShape, variant: Variant | None) -> bool:
    experts = shape.text.experts if variant is None else variant.towers
    return world.parallel.sequence_parallel(experts=experts is not None)


def _options(config: VerifyConfig) -> tuple[str, ...]:
    recompute = config.recompute
    return (
        *((f"cp-comm {config.parallel.cp_comm}",) if config.parallel.cp > 1 else ()),
        *((f"recompute {recompute.recompute}",) if recompute.recompute != "none" else ()),
        *(("recompute vision",) if recompute.recompute_vision else ()),
    )


@dataclass(frozen=True)
class _Found:
    difference: Difference
    tolerance: Tolerance
    spread: float


def _by_layer(
    world: World, config: VerifyConfig, folder: Path, shape: Qwen3VLShape, samples: Sequence[Sample]
) -> _Found | None:
    return _Found(compare_by_layer(world, folder, shape, samples, recompute=config.recompute), FP32, 0.0)


def _whole(
    world: World, config: VerifyConfig, folder: Path, shape: Qwen3VLShape, samples: Sequence[Sample]
) -> _Found | None:
    dtype = DTYPES[config.dtype]
    expected, tolerance = _expected(folder, shape, samples, dtype, world.device) if world.is_main else (None, FP32)
    engine = build_engine(world, folder, shape, dtype=dtype, execution=Execution(config.recompute))
    result = run_samples(engine, shape, samples, pack=config.pack)
    if result.outcome is None or expected is None:
        return None
    return _Found(difference(result.outcome, expected), tolerance, result.spread)


def _discriminator(  # noqa: PLR0917  # as the others, and the kind
    world: World, config: VerifyConfig, folder: Path, shape: Qwen3VLShape, variant: Variant, samples: Sequence[Sample]
) -> _Found | None:
    def outcome(dtype: torch.dtype) -> Outcome:
        model = load_plain_discriminator(folder, shape, variant.towers, dtype=dtype, device=world.device)
        return plain_outcome(model, samples, shape, variant.towers)

    dtype, expected, tolerance = DTYPES[config.dtype], None, FP32
    if world.is_main:
        expected = outcome(torch.float32)
        if dtype != torch.float32:
            tolerance = bf16_tolerance([difference(outcome(dtype), expected)])
    engine = build_discriminator(world, folder, dtype=dtype, recompute=config.recompute)
    result = run_discriminator(engine, shape, variant.towers, samples, pack=config.pack)
    if result.outcome is None or expected is None:
        return None
    return _Found(difference(result.outcome, expected), tolerance, result.spread)


def _expected(
    folder: Path, shape: Qwen3VLShape, samples: Sequence[Sample], dtype: torch.dtype, device: torch.device
) -> tuple[Outcome, Tolerance]:
    """transformers' outcome in float32, and how far ours may be from it."""
    model = load_transformers(folder, shape, dtype=torch.float32, device=device)
    expected = transformers_outcome(model, samples, shape)
    del model
    if dtype == torch.float32:
        return expected, FP32
    rounded = load_transformers(folder, shape, dtype=dtype, device=device)
    return expected, bf16_tolerance([difference(transformers_outcome(rounded, samples, shape), expected)])


def _peak_bytes(world: World) -> int:
    """Of this process: on the GPU where there is one, else resident."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
