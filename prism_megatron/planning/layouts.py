"""Which layouts of some GPUs a run fits, ranked by the least time of a step; of others, why not.

Arithmetic compares all of them; those that are named as fitting have been played, one after the other, until as many
as are wanted fit (``confirmed``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.errors import ConfigError
from prism_megatron.planning.build import Layout, Run, StageName
from prism_megatron.planning.floors import step_floor
from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.needs import ESTIMATE_ERROR, Memory, counted_memory, estimated_memory
from prism_megatron.planning.work import phases_of

_TOWER = DiscriminatorConfig().experts_per_tower
HOST = 8
"""GPUs of a host: tensor parallelism and servers stay inside one."""
RECOMPUTE = (
    RecomputeConfig("none"),
    RecomputeConfig("selective", ("mlp",)),
    RecomputeConfig("full"),
    RecomputeConfig("full", recompute_vision=True),
)


OFFLOAD: Mapping[StageName, tuple[tuple[str, ...], ...]] = {
    "sft": ((),),
    "align": ((), ("policy", "discriminator")),
    "rlvr": ((), ("policy",)),
}
"""Roles that may rest in host memory: those beside which something else happens."""


@dataclass(frozen=True)
class Candidate:
    """A layout, what it needs, and the least time of a step; ``refused`` says why a stage would not start it."""

    run: Run
    layout: Layout
    memory: Memory | None = None
    seconds: float = 0.0
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.fits

    @property
    def reason(self) -> str:
        return self.refused or ("" if self.memory is None else self.memory.reason())


def candidates(run: Run, gpu: Gpu) -> list[Candidate]:
    """All layouts of the run's GPUs by arithmetic: those that fit first, the fastest of them first."""
    found = [_looked_at(run, layout, gpu) for layout in layouts(run)]
    return sorted(found, key=lambda one: (not one.fits, bool(one.refused), one.seconds, _simple(one.layout)))


def confirmed(found: Sequence[Candidate], gpu: Gpu, *, wanted: int, tries: int = 6) -> list[Candidate]:
    """The best candidates with their steps played: up to ``wanted`` that fit, and those that were found not to.

    Raises CannotPlayError.
    """
    played: list[Candidate] = []
    for one in [one for one in found if one.memory is not None and _may_fit(one.memory)][:tries]:
        played.append(replace(one, memory=counted_memory(one.run, gpu)))
        if sum(candidate.fits for candidate in played) == wanted:
            break
    return played


def layouts(run: Run) -> Iterator[Layout]:
    """What may be tried on the run's GPUs: powers of two that fill them, and every setting of recomputation."""
    for parallel in _parallels(run):
        for recompute in RECOMPUTE:
            if recompute.recompute_vision and run.stage == "sft":
                continue  # a frozen tower keeps nothing
            for offload in OFFLOAD[run.stage]:
                for rollout_tp in _servers(run):
                    servers = min(HOST, run.world_size) // rollout_tp if rollout_tp else 0
                    yield Layout(parallel, recompute, offload, rollout_tp, servers)


def _parallels(run: Run) -> Iterator[ParallelConfig]:
    world, experts = run.world_size, run.policy.text.experts
    # Beside a policy with experts a discriminator has a layout of its own by default.
    most = experts.count if experts is not None else 1
    if run.stage == "align" and experts is None:
        most = _TOWER
    for tp in _powers(min(HOST, world)):
        for cp in _powers(min(4, world // tp)):
            for pp in _powers(min(16, world // (tp * cp))):
                for ep in _powers(min(most, world // pp)):
                    ends = _ends(run.policy.text.num_layers, pp)
                    if ends is None:
                        continue
                    yield ParallelConfig(
                        tp=tp, cp=cp, pp=pp, ep=ep, sp="on" if tp > 1 else "auto",
                        first_stage_layers=ends[0], last_stage_layers=ends[1],
                    )  # fmt: skip


def _looked_at(run: Run, layout: Layout, gpu: Gpu) -> Candidate:
    try:
        placed = run.laid_out(layout)
        placed.check()
    except ConfigError as error:
        return Candidate(run, layout, refused=str(error))
    memory = estimated_memory(placed, gpu)
    return Candidate(placed, layout, memory, step_floor(phases_of(placed, gpu), gpu) if _may_fit(memory) else 0.0)


def _may_fit(memory: Memory) -> bool:
    """Whether it fits but for the error of an estimate, on either side."""
    return memory.sequences != 0 and memory.worst * (1 - ESTIMATE_ERROR) + memory.reserve <= memory.device_gib


def _servers(run: Run) -> tuple[int, ...]:
    """Sizes of colocated servers to try; 0 for the rollouts as they are asked for."""
    if run.rollout is None or run.rollout.rollout == "sglang":
        return (0,)
    return tuple(size for size in (1, 2, 4, 8) if size <= min(HOST, run.world_size))


def _ends(layers: int, pp: int) -> tuple[int | None, int | None] | None:
    """Layers of the first and the last stage where all do not divide evenly; None where no such ends do."""
    if layers % pp == 0:
        return (None, None)
    middle = -(-layers // pp)
    left = layers - middle * (pp - 2)
    return (left // 2, left - left // 2) if pp > 2 and left >= 2 else None


def _powers(most: int) -> list[int]:
    return [2**n for n in range(max(1, most).bit_length()) if 2**n <= most]


def _simple(layout: Layout) -> tuple[int, ...]:
    one = layout.parallel
    return (len(layout.offload), one.pp, one.cp, one.tp, one.ep)
