"""What a rank sends in a pass, by group: the collectives of Megatron's layers as this engine runs them, counted.

Ranks are numbered tensor parallelism first, then context, data and pipeline (experts: their own tensor parallelism,
expert and data parallelism, pipeline). A group whose ranks lie in one NVLink domain stays there; of one that spans
several, a reduction or gather crosses the network once for each domain, shared by the group's ranks there, which is the
least that any algorithm sends, and an all-to-all sends over the network what belongs to ranks beyond.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prism_megatron.engine.host.memory import RankBytes
from prism_megatron.forecast.plays import Case
from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.held import held_by_part, stage_of

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in one kind of collective."""

    name: str
    count: float
    """collectives"""
    nvlink: float
    """bytes to ranks of its own domain"""
    network: float
    """bytes to others"""


@dataclass(frozen=True)
class _Group:
    size: int
    stride: int
    domain: int

    @property
    def inside(self) -> int:
        """Ranks of the group in one domain."""
        return max(1, min(self.size, self.domain // self.stride))

    def ring(self, name: str, count: float, size: float) -> Traffic:
        """Gathers or scatters of ``size`` bytes altogether each."""
        domains = self.size / self.inside
        return Traffic(
            name,
            count,
            count * size * (self.inside - 1) / self.inside,
            count * size * (domains - 1) / domains / self.inside,
        )

    def exchange(self, name: str, count: float, size: float) -> Traffic:
        """All-to-alls, into each of which a rank gives ``size`` bytes, evenly for all."""
        return Traffic(
            name,
            count,
            count * size * (self.inside - 1) / self.size,
            count * size * (self.size - self.inside) / self.size,
        )


def traffic_of_pass(case: Case, gpu: Gpu, *, tokens: float, microbatches: float, learns: bool) -> list[Traffic]:
    """A rank's, over ``microbatches`` of so many tokens each: forward, and backward where it ``learns``."""
    found = [
        *_layers(case, gpu, tokens, microbatches, learns=learns),
        *_stages(case, gpu, tokens, microbatches, learns),
    ]
    if learns:
        found += _gradients(case, gpu)
    return [one for one in found if one.nvlink or one.network]


def _layers(case: Case, gpu: Gpu, tokens: float, microbatches: float, *, learns: bool) -> Iterable[Traffic]:
    text, parallel = case.shape.text, case.parallel
    local = tokens / parallel.cp
    again = case.recompute.recompute == "full"
    passes = 1 + (1 + again) * learns
    times = stage_of(case).layers * microbatches * passes
    experts = _experts(case)
    sums = 2 if experts is None or parallel.expert_tp > 1 else 1
    if parallel.tp > 1:  # an all-reduce is a scatter and a gather; sequence parallelism has these two
        group = _Group(parallel.tp, 1, gpu.domain)
        yield group.ring("tensor parallel", 2 * sums * times, local * text.hidden * BF16)
    if parallel.cp > 1:
        keys = 2 * text.kv_heads * text.head_dim / parallel.tp
        yield _Group(parallel.cp, parallel.tp, gpu.domain).ring("context parallel", times, tokens * keys * BF16)
    if experts is not None and parallel.ep > 1:
        given = local / parallel.tp * experts * text.hidden * BF16
        yield _Group(parallel.ep, parallel.expert_tp, gpu.domain).exchange("expert parallel", 2 * times, given)


def _stages(case: Case, gpu: Gpu, tokens: float, microbatches: float, learns: bool) -> Iterable[Traffic]:
    parallel = case.parallel
    if parallel.pp == 1:
        return
    stride = case.world_size // parallel.pp
    split = parallel.tp if parallel.sequence_parallel(experts=_experts(case) is not None) else 1
    count = microbatches * parallel.vpp * (1 + learns)
    size = count * tokens / parallel.cp / split * case.shape.text.hidden * BF16
    beyond = stride >= gpu.domain
    yield Traffic("pipeline", count, 0.0 if beyond else size, size if beyond else 0.0)


def _gradients(case: Case, gpu: Gpu) -> Iterable[Traffic]:
    """Summed in fp32 over data-parallel ranks, and weights gathered again, once a step."""
    parallel = case.parallel
    stage = case.world_size // parallel.pp
    parts = held_by_part(case)
    groups = (
        ("data parallel", [held for name, held in parts.items() if name != "experts"], parallel.tp),
        ("experts' data parallel", [parts[n] for n in parts if n == "experts"], parallel.ep * parallel.expert_tp),
    )
    for name, held, stride in groups:
        size = stage // stride
        if size > 1 and held:
            yield _Group(size, stride, gpu.domain).ring(name, 2, _moved(held) / 2)


def _moved(held: Iterable[RankBytes]) -> float:
    """A gradient's four bytes, scattered, and a weight's two, gathered, of all that trains."""
    return sum(one.gradients for one in held) * (FP32 + BF16) / FP32


def _experts(case: Case) -> int | None:
    """Experts that see a token; None where layers have one MLP."""
    if case.towers is not None:
        return case.towers.top_k
    experts = case.shape.text.experts
    return None if experts is None else experts.per_token
