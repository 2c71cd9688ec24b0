"""What a role holds from step to step on one rank, part by part: the arithmetic behind the totals that are counted.

``engine/host/memory.py`` has the formula; here it is applied to the embedding, a layer, a layer's experts, the output
layer and the vision tower apart, once, so that any depth and any pipeline stage is a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.engine.host.memory import RankBytes, bytes_of_rank
from prism_megatron.forecast.plays import Case, provider_of

PARTS = ("embedding", "layers", "experts", "head", "vision")
_FEW = 4
"""Layers of the model that is looked at: no fewer than DeepStack's taps."""


@dataclass(frozen=True)
class Stage:
    """A pipeline stage's place."""

    layers: int
    is_first: bool
    is_last: bool


def stage_of(case: Case) -> Stage:
    """That of the case's rank; ranks of one stage follow one another."""
    parallel = case.parallel
    number = case.rank // (case.world_size // parallel.pp)
    layers = parallel.stage_layers(case.shape.text.num_layers)
    return Stage(layers[number], number == 0, number == parallel.pp - 1)


def held_by_part(case: Case) -> Mapping[str, RankBytes]:
    """Bytes of each part on the case's rank. The parts that it does not hold are missing."""
    stage = stage_of(case)
    text = replace(case.shape.text, num_layers=_FEW)
    parallel = case.parallel
    split = ParallelConfig(
        tp=parallel.tp,
        cp=parallel.cp,
        ep=parallel.ep,
        etp=parallel.etp,
        distributed_optimizer=parallel.distributed_optimizer,
    )
    of = _parts(
        Case(
            case.play,
            replace(case.shape, text=text),
            split,
            world_size=case.world_size // parallel.pp,
            towers=case.towers,
            dtype=case.dtype,
            freeze=case.freeze,
        )
    )
    times = {
        "embedding": stage.is_first or (stage.is_last and case.shape.text.tied and case.play != "judge"),
        "layers": stage.layers,
        "experts": stage.layers,
        "head": stage.is_last,
        "vision": stage.is_first,
    }
    return {
        part: RankBytes(*(count * size for size in (of[part].parameters, of[part].gradients, of[part].optimizer)))
        for part, count in times.items()
        if count and of[part].parameters
    }


def total(parts: Mapping[str, RankBytes]) -> RankBytes:
    """All parts together."""
    return RankBytes(
        sum(one.parameters for one in parts.values()),
        sum(one.gradients for one in parts.values()),
        sum(one.optimizer for one in parts.values()),
    )


def bytes_held(held: RankBytes) -> int:
    """Weights, gradients and optimizer state."""
    return held.parameters + held.gradients + held.optimizer


@lru_cache(maxsize=1024)
def _parts(case: Case) -> Mapping[str, RankBytes]:
    """Of a stage that is first and last, with one layer."""
    found: dict[str, list[WeightMapping]] = {part: [] for part in PARTS}
    for mapping in provider_of(case).weight_mappings():
        part = _part_of(mapping.parameter)
        if part is not None:
            found[part].append(mapping)
    # Experts are alike: one of them stands for all.
    alike = [one for one in found["experts"] if ".local_experts.0." in one.parameter]
    times = len(found["experts"]) // max(1, len(alike))
    sums = {
        part: bytes_of_rank(
            alike if part == "experts" else mappings, case.parallel, world_size=case.world_size, dtype=case.dtype,
            is_frozen=lambda name: is_frozen(case, name),
        )
        for part, mappings in found.items()
    }  # fmt: skip
    one = sums["experts"]
    return {**sums, "experts": RankBytes(times * one.parameters, times * one.gradients, times * one.optimizer)}


def _part_of(name: str) -> str | None:
    """None for layers after the first, which are as that one."""
    if name.startswith("decoder.layers."):
        if not name.startswith("decoder.layers.0."):
            return None
        return "experts" if ".local_experts." in name else "layers"
    if name.startswith("vision_model."):
        return "vision"
    return "embedding" if name.startswith("embedding.") else "head"


def is_frozen(case: Case, name: str) -> bool:
    """Whether a parameter of that name stays as loaded."""
    if name.startswith("vision_model."):
        return ("projector" if "merger" in name else "vision") in case.freeze
    return "router" in case.freeze and ".mlp.router." in name
