"""A plan as lines for people; ``report.py`` has the same as values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from prism_megatron.forecast.verdict import GIB
from prism_megatron.forecast.verdict import table as table_of_needs
from prism_megatron.planning.disk import disk_of
from prism_megatron.planning.floors import Phase, step_floor
from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.held import total
from prism_megatron.planning.layouts import Candidate
from prism_megatron.planning.needs import Memory, parts_of
from prism_megatron.planning.paper import Hours, Smallest
from prism_megatron.planning.report import Plan

_SHOWN_REASONS = 6


def lines_of(plan: Plan) -> Iterator[str]:
    """All of one run."""
    run, gpu = plan.run, plan.gpu
    yield f"{run.stage} on {run.world_size} x {gpu.name}: {run.layout.as_flags()}"
    yield ""
    yield from memory_lines(plan)
    yield ""
    yield from floor_lines(plan.phases, gpu)
    yield ""
    yield from hours_lines(plan.hours)
    if run.stage == "sft" and run.config.steps is None:
        yield "these are the steps of the paper's 1.37 million samples, two to a row (assumed)"
    batch = run.batch()
    yield f"a step: {batch.sequences} sequences, {batch.tokens} tokens with each prompt once"
    disk = disk_of(run)
    each = ", ".join(f"{role} {size / GIB:.1f}" for role, size in disk.checkpoint.items())
    yield (
        f"disk: a checkpoint {sum(disk.checkpoint.values()) / GIB:.1f} GiB ({each}), {disk.kept} kept by the end, "
        f"{disk.total / GIB:.0f} GiB with the export"
    )


def memory_lines(plan: Plan) -> Iterator[str]:
    """Parts by arithmetic, then what was counted, then the verdict."""
    memory, planned = plan.memory, plan.run.planned()
    yield "memory of a rank, GiB: weights, gradients and optimizer state by part (arithmetic)"
    for need in memory.needs:
        for role, parts in parts_of(planned, need.rank).items():
            for name, one in [*parts.items(), ("together", total(parts))]:
                sizes = "".join(f"{size / GIB:>12.2f}" for size in (one.parameters, one.gradients, one.optimizer))
                yield f"{need.rank:>5}  {role:<14}{name:<11}{sizes}"
    yield "with activations, " + (
        "counted on the step itself" if memory.is_counted else "estimated, no step was played"
    )
    yield from table_of_needs(memory.needs)
    yield from serving_lines(memory)
    if plan.run.rollout is not None and plan.run.rollout.rollout_urls:
        yield "sampling: by the servers of --rollout-urls, which may be cut in any way: their memory is not counted"
    for margin in memory.margins:
        yield f"{margin.gib:>8.2f} GiB assumed: {margin.name} ({margin.why})"
    verdict = "fits" if memory.fits else f"does not fit: {memory.reason()}"
    yield f"{memory.worst:.1f} GiB and {memory.reserve:.1f} of margins, of {memory.device_gib:g}: {verdict}"


def serving_lines(memory: Memory) -> Iterator[str]:
    """Who samples, on a GPU of theirs."""
    one = memory.serving
    if one is None:
        return
    yield (
        f"sampling: {one.engines} {one.kind} of {one.gpus}; on each GPU {one.weights / GIB:.2f} GiB of weights, "
        f"{one.resting / GIB:.2f} of the trainer, {one.handover / GIB:.2f} of hand-over buffers, "
        f"{one.margin / GIB:.2f} assumed; keys and values {one.a_token / 1024:.1f} KiB a token: "
        f"{memory.sequences} of {one.longest} tokens at once in each"
    )


def floor_lines(phases: Sequence[Phase], gpu: Gpu) -> Iterator[str]:
    """A row for each phase: what a GPU does, and the least time by the roof that it hits."""
    yield f"a step's least time on {gpu.name} ({gpu.source}); published roofs, nothing measured"
    heads = f"{'TFLOP':>10}{'HBM GB':>10}{'NVLink GB':>11}{'network GB':>12}{'collectives':>13}{'seconds':>10}  roof"
    yield f"{'phase':<34}{heads}"
    for phase in phases:
        roof, seconds = phase.floor(gpu)
        yield (
            f"{phase.name:<34}{phase.flops / 1e12:>10.1f}{phase.hbm / 1e9:>10.1f}{phase.nvlink / 1e9:>11.2f}"
            f"{phase.network / 1e9:>12.2f}{phase.collectives:>13.0f}{seconds:>10.3f}  {roof}"
        )
        for one in phase.traffic:
            yield f"    {one.name}: {one.count:.0f} collectives, {(one.nvlink + one.network) / 1e9:.2f} GB"
    yield f"{'together':<34}{'':>56}{step_floor(phases, gpu):>10.3f}"


def hours_lines(hours: Hours) -> Iterator[str]:
    """Of the whole stage."""
    yield (
        f"{hours.steps} steps: {hours.floor:.1f} h at the floors; at {hours.share:.0%} of the roofs (assumed) "
        f"{hours.likely:.1f} h, {hours.gpu_hours:.0f} GPU-hours"
    )


def layout_lines(fitting: Sequence[Candidate], others: Sequence[Candidate]) -> Iterator[str]:
    """Those that fit, and why others do not, the commonest reasons first with an example each."""
    for number, one in enumerate(fitting, start=1):
        assert one.memory is not None
        how = "counted" if one.memory.is_counted else "estimated"
        yield (f"{number:>3}  {one.seconds:>9.2f} s  {one.memory.worst:>6.1f} GiB {how:<10} {one.layout.as_flags()}")
    reasons = Counter(_kind(one) for one in others)
    for kind, count in reasons.most_common(_SHOWN_REASONS):
        example = min((one for one in others if _kind(one) == kind), key=_need)
        yield f"     {count} others: {kind}, such as {example.layout.as_flags()}: {example.reason}"


def smallest_lines(found: Sequence[Smallest]) -> Iterator[str]:
    """A table in Markdown."""
    yield "| model | stage | GPUs | layout | GiB and margins | why not half as many |"
    yield "|---|---|---|---|---|---|"
    for one in found:
        memory = one.candidate.memory
        assert memory is not None
        how = "counted" if memory.is_counted else "estimated"
        yield (
            f"| {one.model} | {one.stage} | {one.gpus} | `{one.candidate.layout.as_flags()}` | "
            f"{memory.worst:.1f} + {memory.reserve:.1f}, {how} | {one.below} |"
        )


def _kind(one: Candidate) -> str:
    if one.refused:
        return "refused by the stage"
    assert one.memory is not None
    return "no room for answers" if one.memory.trains else "too little memory"


def _need(one: Candidate) -> float:
    return one.memory.worst if one.memory is not None else 0.0
