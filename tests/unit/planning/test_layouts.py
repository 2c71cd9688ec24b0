"""Which layouts a search names, and what it says of the others. Memory is arithmetic here; nothing is played."""

from __future__ import annotations

from dataclasses import replace

from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.planning.gpus import gpu_of
from prism_megatron.planning.layouts import _ends, candidates, layouts
from prism_megatron.planning.needs import estimated_memory
from prism_megatron.planning.paper import paper_run

H100 = gpu_of("h100-80")


def test_layouts_fill_the_gpus_and_are_told_apart() -> None:
    """Claim: every layout is one that the stage starts, fits, or has a reason; those that fit come first, by time."""
    found = candidates(paper_run("sft", "4B", gpus=2), H100)
    assert len({one.layout for one in found}) == len(found) > 10
    assert all(one.fits or one.reason for one in found)
    fits = [one.fits for one in found]
    assert fits == sorted(fits, reverse=True)
    times = [one.seconds for one in found if one.fits]
    assert times == sorted(times) and times[0] > 0


def test_the_papers_own_setup_fits() -> None:
    """Claim: 4B policy, discriminator of 2B with two towers of four experts, eight H100-80: alignment fits."""
    best = candidates(paper_run("align", "4B", gpus=8), H100)[0]
    assert best.fits, best.reason
    assert best.memory is not None and best.memory.sequences


def test_a_model_that_is_too_large_has_a_reason_everywhere() -> None:
    """Claim: where nothing fits, layouts say by how much, and what a stage refuses is said in its words."""
    found = candidates(paper_run("sft", "32B", gpus=2), H100)
    assert not any(one.fits for one in found)
    assert any("are held before it begins" in one.reason for one in found)


def test_a_refusal_is_the_stages_own() -> None:
    """Claim: rows that do not divide over data-parallel ranks are refused as the stage refuses them."""
    run = paper_run("sft", "2B", gpus=64)
    found = candidates(run, H100)
    refused = [one for one in found if one.refused]
    assert any("--rows-per-step 16 must be a multiple" in one.refused for one in refused)


def test_ends_take_what_does_not_divide() -> None:
    """Claim: 94 layers go into 8 stages with 11 at both ends, 36 into 4 evenly, 5 into 4 in no way of ours."""
    assert _ends(94, 8) == (11, 11)
    assert _ends(36, 4) == (None, None)
    assert _ends(5, 4) is None


def test_servers_are_tried_where_none_are_asked_for() -> None:
    """Claim: a search tries colocated servers of every size; a run that names its servers keeps them."""
    run = paper_run("rlvr", "4B", gpus=4)
    assert {one.rollout_tp for one in layouts(run)} == {1, 2, 4}
    assert isinstance(run.config, RLVRConfig)
    served = replace(run, config=replace(run.config, rollout=replace(run.config.rollout, rollout="sglang")))
    assert {one.rollout_tp for one in layouts(served)} == {0}


def test_servers_of_others_are_not_judged() -> None:
    """Claim: how they are cut is not known here, so a run that names them is held to what it trains alone."""
    run = paper_run("rlvr", "235B-A22B", gpus=256)
    assert isinstance(run.config, RLVRConfig)
    others = replace(run.config.rollout, rollout="sglang", rollout_urls=("http://node:30000",))
    memory = estimated_memory(replace(run, config=replace(run.config, rollout=others)), H100)
    assert memory.serving is None and memory.sequences is None
    assert memory.fits == memory.trains
