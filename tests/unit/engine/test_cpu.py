"""The CPU door: every patch is documented, aims at a name that exists, and answers as its reason says."""

from __future__ import annotations

import importlib

import pytest
import torch

from prism_megatron.engine.host.cpu import PATCHES, Patch, open_cpu_door

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the door is for machines without CUDA")


@pytest.fixture(autouse=True)
def _open() -> None:
    assert open_cpu_door()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.module}.{patch.name}")
def test_every_patch_is_documented_and_aims_at_something(patch: Patch) -> None:
    """Claim: place, versions, reason and end are filled in, and upstream still has the name."""
    assert all((patch.upstream, patch.versions, patch.reason, patch.until))
    owner = importlib.import_module(patch.module)
    for part in patch.name.split("."):
        owner = getattr(owner, part)


def test_cuda_tensors_are_made_on_the_cpu() -> None:
    """Claim: the spellings that Megatron uses for 'the GPU' all give CPU tensors, other devices are left alone."""
    for tensor in (
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device="cuda"),
        torch.empty(2, device=torch.cuda.current_device()),
        torch.empty_like(torch.ones(2), device="cuda"),
        torch.ones(2).cuda(),
    ):
        assert tensor.device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.empty(2).device.type == torch.get_default_device().type == "meta"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.int32).dtype == torch.int32


def test_the_rng_tracker_forks_the_cpu_generator() -> None:
    """Claim: a fork draws from its own stream and leaves the default one where it was."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draws(forked: bool) -> tuple[float, float]:
        torch.manual_seed(1)
        tracker = CudaRNGStatesTracker()
        tracker.add("other", 99)
        inside = 0.0
        if forked:
            with tracker.fork("other"):
                inside = float(torch.rand(()))
        return inside, float(torch.rand(()))

    torch.manual_seed(99)
    expected_inside = float(torch.rand(()))
    assert draws(forked=True) == (expected_inside, draws(forked=False)[1])
