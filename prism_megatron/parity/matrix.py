"""The table of ``make parity``: tiny models x layouts x packing x sample sets, and what each rank does for a cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.engine.host.execution import PLAIN, Execution
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError
from prism_megatron.parity.compare import (
    FP32,
    REPLICA_TOLERANCE,
    Difference,
    Outcome,
    Tolerance,
    bf16_tolerance,
    difference,
    gradient_errors,
)
from prism_megatron.parity.ranks import build_engine, run_samples
from prism_megatron.parity.samples import sample_sets

Packing = Literal["padded", "packed"]
PACKINGS: tuple[Packing, ...] = ("padded", "packed")
SETS = tuple(sample_sets())

LAYOUTS: Mapping[str, ParallelConfig] = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tp=2),
    "TP4": ParallelConfig(tp=4),
    "TP2·SP": ParallelConfig(tp=2, sp="on"),
    "PP2": ParallelConfig(pp=2),
    "PP4": ParallelConfig(pp=4),
    "PP2·VPP2": ParallelConfig(pp=2, vpp=2),
    "CP2": ParallelConfig(cp=2),
    "CP2·a2a": ParallelConfig(cp=2, cp_comm="a2a"),
    "CP4": ParallelConfig(cp=4),
    "TP2·CP2": ParallelConfig(tp=2, cp=2),
    "TP2·PP2·CP2": ParallelConfig(tp=2, pp=2, cp=2),
    "EP2": ParallelConfig(ep=2),
    "EP4": ParallelConfig(ep=4),
    "TP2·EP2": ParallelConfig(tp=2, ep=2),
    "ETP2": ParallelConfig(etp=2),
    "DP2": ParallelConfig(),
    # Experts split otherwise than the rest; more ranks than key/value heads; the pipeline with all that reshapes its
    # payload.
    "TP2·ETP1": ParallelConfig(tp=2, etp=1),
    "TP2·EP2·ETP2": ParallelConfig(tp=2, ep=2, etp=2),
    "CP2·EP2": ParallelConfig(cp=2, ep=2),
    "PP2·EP2": ParallelConfig(pp=2, ep=2),
    "TP8": ParallelConfig(tp=8),
    "TP2·SP·PP2·VPP2": ParallelConfig(tp=2, pp=2, vpp=2, sp="on"),
}
"""DP2 shards its optimizer, as every layout with data-parallel ranks does."""

EXTRA_LAYOUTS = ("CP2·a2a", "TP8", "TP2·SP·PP2·VPP2", "TP2·ETP1", "TP2·EP2·ETP2", "CP2·EP2", "PP2·EP2")
"""Left out of the recompute table, which has at most 40 lines."""

BF16_LAYOUTS = ("TP1", "TP2·PP2·CP2")

FULL = RecomputeConfig(recompute="full")
VISION = RecomputeConfig(recompute_vision=True)
SELECTIVE = RecomputeConfig(recompute="selective", recompute_modules=("core_attn", "mlp"))
RECOMPUTES = {
    "full": FULL,
    "vision": VISION,
    "full+vision": dataclasses.replace(FULL, recompute_vision=True),
    "selective": SELECTIVE,
}
RECOMPUTE_TOLERANCE = 1e-5
"""Relative to each gradient's norm: recomputing changes nothing but, at most, the order of a sum."""


@dataclass(frozen=True)
class Cell:
    """One line of the table; ``reason`` says why there is nothing to measure."""

    model: str
    layout: str
    packing: str
    samples: str
    dtype: str = "fp32"
    difference: Difference | None = None
    tolerance: Tolerance | None = None
    spread: float = 0.0
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Within tolerance, with equal copies of replicated gradients; or there is nothing to measure."""
        if self.difference is None or self.tolerance is None:
            return bool(self.reason)
        return self.difference.within(self.tolerance) and self.spread <= REPLICA_TOLERANCE


@dataclass(frozen=True)
class Block:
    """Cells that one engine measures: one model in one layout."""

    model: str
    layout: str
    packings: Sequence[Packing] = PACKINGS
    sets: Sequence[str] = SETS
    dtype: torch.dtype = torch.float32
    execution: Execution = PLAIN
    """must need no longer rows than the layout"""

    @property
    def number_format(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


@dataclass(frozen=True)
class RecomputeCell:
    """One line of the recompute table: the worst gradient against the same layout without recompute."""

    model: str
    layout: str
    packing: Packing
    samples: str
    recompute: str
    worst: tuple[str, float] = ("", 0.0)

    @property
    def ok(self) -> bool:
        return self.worst[1] <= RECOMPUTE_TOLERANCE


def num_ranks(layout: str) -> int:
    """Processes of a layout: the fewest that hold it, twice as many for data parallelism by itself."""
    return 2 if layout == "DP2" else smallest_world(LAYOUTS[layout])


def reason_against(shape: Qwen3VLShape, layout: str) -> str:
    """Why a model does not run in a layout; empty when it does."""
    parallel = LAYOUTS[layout]
    if not shape.text.num_experts and (parallel.ep > 1 or parallel.etp is not None):
        return "the model has no experts"
    try:
        shape.check_layout(parallel)
    except ConfigError as error:
        return str(error)
    return ""


def outcome_path(folder: Path, samples: str, dtype: torch.dtype) -> Path:
    """Where transformers' outcome of a sample set is kept."""
    return folder / f"{samples}.{str(dtype).removeprefix('torch.')}.outcome"


def expected_outcome(folder: Path, samples: str, dtype: torch.dtype = torch.float32) -> Outcome:
    """What ``tiny.prepare`` left there."""
    return Outcome(*torch.load(outcome_path(folder, samples, dtype), weights_only=True))


def measure(world: World, folder: Path, block: Block) -> list[Cell]:
    """A block's cells against transformers in fp32; empty but on rank 0."""
    shape, cells = Qwen3VLShape.from_folder(folder), []
    engine = build_engine(world, folder, shape, dtype=block.dtype, execution=block.execution)
    tolerance = FP32
    if block.dtype == torch.bfloat16 and world.is_main:
        tolerance = bf16_tolerance(
            [difference(expected_outcome(folder, name, block.dtype), expected_outcome(folder, name)) for name in SETS]
        )
    for packing in block.packings:
        for name in block.sets:
            result = run_samples(engine, shape, sample_sets()[name], pack=packing == "packed")
            if result.outcome is None:
                continue
            expected = expected_outcome(folder, name)
            found = difference(result.outcome, expected)
            cells.append(
                Cell(block.model, block.layout, packing, name, block.number_format, found, tolerance, result.spread)
            )
    return cells


@dataclass(frozen=True)
class Bench:
    """What the tables are measured on: ``run`` is ``GlooWorld.run``; a folder and a shape for each model."""

    run: Callable[..., list[Any]]
    folders: Mapping[str, Path]
    shapes: Mapping[str, Qwen3VLShape]
    layouts: Sequence[str]

    def measure(self, block: Block) -> list[Cell]:
        """A block's cells."""
        cells: list[Cell] = self.run(
            measure,
            self.folders[block.model],
            block,
            parallel=LAYOUTS[block.layout],
            num_ranks=num_ranks(block.layout),
        )[0]
        return cells


def parity_cells(bench: Bench) -> Iterator[Cell]:
    """The whole table in float32, then ``BF16_LAYOUTS`` in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        for model, shape in bench.shapes.items():
            for layout in bench.layouts:
                block = Block(model, layout, dtype=dtype)
                if reason := reason_against(shape, layout):
                    if dtype == torch.float32:
                        yield Cell(model, layout, "both", "all", reason=reason)
                elif dtype == torch.float32 or layout in BF16_LAYOUTS:
                    yield from bench.measure(block)


def recompute_results(bench: Bench) -> Iterator[RecomputeCell]:
    """The recompute table."""
    for cell in recompute_cells(bench.shapes, bench.layouts):
        yield bench.run(
            measure_recompute,
            bench.folders[cell.model],
            cell,
            parallel=LAYOUTS[cell.layout],
            num_ranks=num_ranks(cell.layout),
        )[0]


def recompute_cells(shapes: Mapping[str, Qwen3VLShape], layouts: Sequence[str]) -> Iterator[RecomputeCell]:
    """Each layout once per model; kinds of recompute, packings and sample sets go round so that they meet in pairs."""
    kinds = list(RECOMPUTES)
    number = 0
    for model, shape in shapes.items():
        for layout in layouts:
            if layout not in EXTRA_LAYOUTS and not reason_against(shape, layout):
                rounds, turn = divmod(number, len(kinds))
                packing, samples = PACKINGS[rounds % len(PACKINGS)], SETS[(number + rounds) % len(SETS)]
                yield RecomputeCell(model, layout, packing, samples, kinds[turn])
                number += 1


def measure_recompute(world: World, folder: Path, cell: RecomputeCell) -> RecomputeCell:
    """``cell`` with its worst gradient, on rank 0."""
    shape = Qwen3VLShape.from_folder(folder)
    results = []
    for recompute in (RecomputeConfig(), RECOMPUTES[cell.recompute]):
        engine = build_engine(world, folder, shape, dtype=torch.float32, execution=Execution(recompute))
        samples = sample_sets()[cell.samples]
        results.append(run_samples(engine, shape, samples, pack=cell.packing == "packed").outcome)
    plain, recomputed = results
    if plain is None or recomputed is None:
        return cell
    return dataclasses.replace(cell, worst=gradient_errors(recomputed.gradients, plain.gradients)[0])
