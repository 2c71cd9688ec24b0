"""What a deep model's step holds, found by playing it at two small depths: all that is held is linear in layers.

A layer adds as many bytes as the one before it, to what is held and to what a pass keeps; what does not grow (the
output layer, the vision tower, the layer that runs backward) is in both plays. A pass takes the larger of several
peaks, each linear, so the line through two depths is exact where the same one is the larger at both and at the whole
depth. ``tests/integration/test_plan_plays.py`` holds it to whole plays, within 1 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prism_megatron.engine.dry.counted import Counted
from prism_megatron.forecast.before_start import CannotPlayError, played
from prism_megatron.forecast.plays import Case
from prism_megatron.planning.held import stage_of

DEPTHS = (4, 6)
"""Layers of a stage that is played: no fewer than DeepStack's taps."""
_FIELDS = ("parameters", "gradients", "optimizer", "pass_peak", "step_peak")


def counted(cases: Sequence[Case]) -> list[Counted]:
    """What each case holds, played in one child process. Raises CannotPlayError, naming role and rank."""
    plays = [shallow for case in cases for shallow in _shallow(case)]
    lines = iter(zip(plays, played(plays), strict=True))
    found = []
    for case in cases:
        counts = []
        for _ in _shallow(case):
            one, line = next(lines)
            if "error" in line:
                raise CannotPlayError(f"{one.play} of rank {one.rank} could not be played: {line['error']}")
            counts.append(Counted(**line["counted"]))
        found.append(_at_depth(case, counts))
    return found


def _shallow(case: Case) -> list[Case]:
    """The case at both depths; itself where it is no deeper than they are."""
    parallel = case.parallel
    if stage_of(case).layers <= DEPTHS[-1]:
        return [replace(case, parallel=replace(parallel, vpp=1))]
    even = replace(parallel, vpp=1, first_stage_layers=None, last_stage_layers=None)
    return [
        replace(
            case, parallel=even, shape=replace(case.shape, text=replace(case.shape.text, num_layers=depth * even.pp))
        )
        for depth in DEPTHS
    ]


def _at_depth(case: Case, counts: Sequence[Counted]) -> Counted:
    if len(counts) == 1:
        return counts[0]
    low, high = counts
    steps = (stage_of(case).layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    values = {name: round(getattr(low, name) + steps * (getattr(high, name) - getattr(low, name))) for name in _FIELDS}
    if case.parallel.vpp > 1:
        # Not played: interleaved stages start more micro-batches before the first one comes back.
        pp, vpp = case.parallel.pp, case.parallel.vpp
        values["pass_peak"] = round(values["pass_peak"] * (1 + (pp - 1) / (pp * vpp)))
    return Counted(**values)
