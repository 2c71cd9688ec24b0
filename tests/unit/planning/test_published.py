"""What others have published (``published.py``), held against plans by arithmetic; CI plays none of them."""

from __future__ import annotations

import pytest

from prism_megatron.planning.build import Run
from prism_megatron.planning.floors import step_floor
from prism_megatron.planning.gpus import gpu_of
from prism_megatron.planning.needs import estimated_memory
from prism_megatron.planning.work import phases_of
from tests.unit.planning.published import MEASURED, MUST_FIT, OUT_OF_MEMORY, TOO_LARGE

H100 = gpu_of("h100-80")
TIGHT = {"Bridge, SFT: 8B on 2, TP2", "Bridge, SFT: 30B on 8, EP8"}
"""Those that leave less than the margins: 73.5 and 75.3 GiB are held from step to step already."""


@pytest.mark.parametrize("name", MUST_FIT)
def test_published_layouts_fit(name: str) -> None:
    """Claim: layouts that others train in fit an 80 GB device, and all but two of them beside the assumed margins."""
    run = MUST_FIT[name]
    run.check()
    memory = estimated_memory(run, H100)
    assert memory.worst <= H100.memory_gib, memory.reason()
    assert memory.fits is (name not in TIGHT), memory.reason()


def test_what_ran_out_of_memory_is_tight() -> None:
    """Claim: of the layout that somebody's device did not hold, at most a seventh of the device is left.

    Routing that is not even, and that project's own buffers, are in what they had and not in the plan.
    """
    memory = estimated_memory(OUT_OF_MEMORY, gpu_of("a100-80"))
    left = memory.device_gib - memory.worst - memory.reserve
    assert left <= memory.device_gib / 7


def test_a_recipe_that_18_bytes_a_parameter_rule_out_does_not_fit() -> None:
    """Claim: by Megatron-Bridge's own formula, 18 bytes a parameter, 32 devices would have to hold 123 GiB each."""
    TOO_LARGE.check()
    memory = estimated_memory(TOO_LARGE, H100)
    assert memory.worst > 235e9 * 18 / 32 / 2**30 > H100.memory_gib
    assert not memory.fits
    assert "are held before it begins" in memory.reason()


@pytest.mark.parametrize("name", MEASURED)
def test_no_floor_is_above_a_measured_time(name: str) -> None:
    """Claim: the least time of a step is below what somebody measured, and not so far below that it says nothing."""
    run, device, measured = MEASURED[name]
    run.check()
    floor = step_floor(phases_of(run, gpu_of(device)), gpu_of(device))
    assert measured / 15 < floor < measured


def test_the_dense_models_floor_is_its_arithmetic() -> None:
    """Claim: 8B on 16 devices cannot be faster than 6 FLOPs for each parameter and token take: 12 s at 989 TFLOP/s.

    Within 15 %: attention's pairs come on top, and the input embedding computes nothing.
    """
    run: Run = MEASURED["8B on 16 H100"][0]
    floor = step_floor(phases_of(run, H100), H100)
    assert floor == pytest.approx(6 * 8.19e9 * 1024 * 4096 / 16 / 989.4e12, rel=0.15)
