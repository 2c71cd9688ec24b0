"""What a run needs of each GPU's memory: counted on the real step, or told by arithmetic where many are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prism_megatron.engine.dry.counted import Counted
from prism_megatron.engine.host.memory import RankBytes
from prism_megatron.forecast.before_start import whole_policy
from prism_megatron.forecast.build import Planned
from prism_megatron.forecast.plays import Case
from prism_megatron.forecast.verdict import GIB, RankNeed, held, neediest
from prism_megatron.planning.activations import estimate_pass, estimate_step
from prism_megatron.planning.build import Run, case_on
from prism_megatron.planning.depth import counted
from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.held import held_by_part, total
from prism_megatron.planning.serving import Serving, serving_of

ESTIMATE_ERROR = 0.10
"""How far an estimate of all a rank needs may lie from a play's (``tests/integration/test_plan_plays.py``)."""


@dataclass(frozen=True)
class Margin:
    """Bytes that nothing counts, and why so many are set aside. All are assumed; none was measured."""

    name: str
    gib: float
    why: str


@dataclass(frozen=True)
class Memory:
    """A run's memory, rank by rank, against a device."""

    needs: Sequence[RankNeed]
    serving: Serving | None
    margins: Sequence[Margin]
    device_gib: float
    is_counted: bool
    """whether the step was played; otherwise it is arithmetic"""

    @property
    def worst(self) -> float:
        """GiB of the neediest rank while it trains, without margins."""
        return neediest(self.needs).at_worst()[1] / GIB

    @property
    def reserve(self) -> float:
        return sum(margin.gib for margin in self.margins)

    @property
    def sequences(self) -> int | None:
        """Longest answers that one engine draws at once; None where nobody samples, or servers of others do."""
        if self.serving is None:
            return None
        return self.serving.sequences((self.device_gib - self.reserve) * GIB)

    @property
    def trains(self) -> bool:
        return self.worst + self.reserve <= self.device_gib

    @property
    def fits(self) -> bool:
        return self.trains and self.sequences != 0

    def reason(self) -> str:
        """Why it does not fit; empty where it does."""
        if not self.trains:
            need = neediest(self.needs)
            role, size = need.at_worst()
            counted_role = need.roles[role]
            peak = max(counted_role.pass_peak, counted_role.step_peak)
            return (
                f"{self.worst:.1f} GiB and {self.reserve:.1f} of margins, of {self.device_gib:g}, in the step of the "
                f"{role} of rank {need.rank} ({(size - peak) / GIB:.1f} are held before it begins)"
            )
        if self.sequences == 0:
            assert self.serving is not None
            return (
                f"no room for keys and values of one answer beside {self.serving.weights / GIB:.1f} GiB of weights of "
                f"{self.serving.kind} and {self.serving.resting / GIB:.1f} of the trainer"
            )
        return ""


def counted_memory(run: Run, gpu: Gpu) -> Memory:
    """By playing each role's step. Raises CannotPlayError."""
    return _memory(run, gpu, counted, is_counted=True)


def estimated_memory(run: Run, gpu: Gpu) -> Memory:
    """By arithmetic, at once."""
    return _memory(run, gpu, lambda cases: [estimated(case) for case in cases], is_counted=False)


def estimated(case: Case) -> Counted:
    """What a play would count of the case, about."""
    sums = total(held_by_part(case))
    return Counted(sums.parameters, sums.gradients, sums.optimizer, estimate_pass(case).peak, estimate_step(case))


def _memory(run: Run, gpu: Gpu, count: Callable[[Sequence[Case]], Sequence[Counted]], *, is_counted: bool) -> Memory:
    planned = run.planned()
    places = [(rank, role) for rank in planned.ranks() for role in planned.roles]
    cases = [case_on(planned.roles[role], rank) for rank, role in places]
    found = dict(zip(places, count(cases), strict=True))
    offloaded = [role for role, case in planned.roles.items() if case.optimizer.offload]
    needs = [
        RankNeed(
            rank,
            {role: found[rank, role] for role in planned.roles},
            offloaded,
            (whole_policy(planned.policy) if planned.samples_here else 0)
            + (found[rank, "policy"].parameters if planned.has_reference else 0),
        )
        for rank in planned.ranks()
    ]
    device = run.config.forecast.device_gib or gpu.memory_gib
    sizes = [held(one) for need in needs for one in need.roles.values()]
    return Memory(needs, _serving(run, planned, needs), margins_of(run, sum(sizes) / len(needs)), device, is_counted)


def _serving(run: Run, planned: Planned, needs: Sequence[RankNeed]) -> Serving | None:
    if run.rollout is None or run.rollout.rollout_urls:  # others' servers may be cut in any way
        return None
    resting = max(
        sum(one.parameters if name in need.offloaded else held(one) for name, one in need.roles.items())
        for need in needs
    )
    batch = run.batch()
    return serving_of(run.rollout, planned.policy, resting=resting, longest=batch.prompt_tokens + batch.answer_tokens)


def margins_of(run: Run, bytes_held: float) -> list[Margin]:
    """What is set aside. ``--device-reserve-gib`` takes the place of all, where it is not left as it is."""
    settings = run.config.forecast
    if settings.device_reserve_gib != type(settings)().device_reserve_gib:
        return [Margin("--device-reserve-gib", settings.device_reserve_gib, "as it was asked for")]
    one = run.config.parallel
    axes = {"tp": one.tp, "pp": one.pp, "cp": one.cp, "ep": one.ep}
    axes["dp"] = run.world_size // one.model_parallel_size
    groups = [name for name, size in axes.items() if size > 1]
    margins = [
        Margin("CUDA context", 0.5, "kernels and context of one process"),
        Margin("cuBLAS workspace", 0.03, "32 MiB, torch's default on Hopper"),
        Margin("NCCL", 0.2 * len(groups), f"0.2 for each communicator: {', '.join(groups) or 'none'}"),
        Margin("allocator", 0.02 * bytes_held / GIB, "2 % of what is held: rounding and fragments"),
    ]
    if run.rollout is not None and run.rollout.rollout_colocated:
        margins.append(Margin("colocated server", 1.0, "context and workspaces of a server whose memory is released"))
    if run.config.precision.transformer_engine != "off":
        margins.append(Margin("Transformer Engine", 0.25, "workspaces of its layers, where it is installed"))
    return margins


def parts_of(planned: Planned, rank: int) -> Mapping[str, Mapping[str, RankBytes]]:
    """The arithmetic of each role on a rank, for tables."""
    return {role: held_by_part(case_on(case, rank)) for role, case in planned.roles.items()}
