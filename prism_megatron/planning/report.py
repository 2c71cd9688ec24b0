"""A plan: everything about one run that can be told before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prism_megatron.planning.build import Run
from prism_megatron.planning.disk import disk_of
from prism_megatron.planning.floors import Phase
from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.layouts import Candidate
from prism_megatron.planning.needs import Memory, counted_memory, estimated_memory, parts_of
from prism_megatron.planning.paper import Hours, Smallest, hours_of
from prism_megatron.planning.work import phases_of


@dataclass(frozen=True)
class Plan:
    """One run on one kind of GPU."""

    run: Run
    gpu: Gpu
    memory: Memory
    phases: Sequence[Phase]
    hours: Hours


def plan_of(run: Run, gpu: Gpu, *, play: bool, share: float) -> Plan:
    """Raises ConfigError for what the stage would refuse, CannotPlayError where its step cannot be played."""
    run.check()
    memory = counted_memory(run, gpu) if play else estimated_memory(run, gpu)
    return Plan(run, gpu, memory, phases_of(run, gpu), hours_of(run, gpu, share=share))


def values_of(plan: Plan) -> dict[str, Any]:
    """As JSON: bytes, seconds and FLOPs of one GPU, nothing rounded."""
    run, memory = plan.run, plan.memory
    planned = run.planned()
    return {
        "stage": run.stage,
        "gpus": run.world_size,
        "gpu": asdict(plan.gpu),
        "layout": run.layout.as_flags(),
        "memory": {
            **memory_values(memory),
            "ranks": [
                {
                    "rank": need.rank,
                    "beside": need.beside,
                    "roles": {
                        role: {
                            **asdict(counted),
                            "parts": {name: asdict(one) for name, one in parts_of(planned, need.rank)[role].items()},
                        }
                        for role, counted in need.roles.items()
                    },
                }
                for need in memory.needs
            ],
        },
        "phases": [
            {
                "name": phase.name, "flops": phase.flops, "hbm_bytes": phase.hbm, "seconds": phase.seconds(plan.gpu),
                "roof": phase.floor(plan.gpu)[0], "floor_seconds": phase.floor(plan.gpu)[1],
                "traffic": [asdict(one) for one in phase.traffic],
            }
            for phase in plan.phases
        ],
        "batch": asdict(run.batch()),
        "disk": asdict(disk_of(run)),
        "hours": {**asdict(plan.hours), "floor": plan.hours.floor, "likely": plan.hours.likely,
                  "gpu_hours": plan.hours.gpu_hours},
    }  # fmt: skip


def memory_values(memory: Memory) -> dict[str, Any]:
    """The verdict."""
    return {
        "fits": memory.fits,
        "reason": memory.reason(),
        "worst_gib": memory.worst,
        "margins": [asdict(one) for one in memory.margins],
        "device_gib": memory.device_gib,
        "is_counted": memory.is_counted,
        "serving": None if memory.serving is None else {**asdict(memory.serving), "sequences": memory.sequences},
    }


def candidate_values(one: Candidate) -> dict[str, Any]:
    """A layout that was looked at."""
    memory = None if one.memory is None else memory_values(one.memory)
    return {"layout": one.layout.as_flags(), "seconds": one.seconds, "reason": one.reason, "memory": memory}


def smallest_values(one: Smallest) -> dict[str, Any]:
    """A row of the table of smallest numbers."""
    return {
        "model": one.model, "stage": one.stage, "gpus": one.gpus, "below": one.below, **candidate_values(one.candidate)
    }  # fmt: skip
