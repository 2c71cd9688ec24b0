"""Layouts that fit, and those that do not: what a command asks for."""

from __future__ import annotations

from prism_megatron.planning.build import Run
from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.layouts import Candidate, candidates, confirmed


def search(run: Run, gpu: Gpu, *, wanted: int, play: bool) -> tuple[list[Candidate], list[Candidate]]:
    """Up to ``wanted`` layouts that fit, the fastest first, and all that do not. Raises CannotPlayError."""
    if not wanted:
        return [], []
    found = candidates(run, gpu)
    if not play:
        return [one for one in found if one.fits][:wanted], [one for one in found if not one.fits]
    played = confirmed(found, gpu, wanted=wanted)
    seen = {one.layout for one in played}
    rest = [one for one in found if not one.fits and one.layout not in seen]
    return [one for one in played if one.fits], [one for one in played if not one.fits] + rest
