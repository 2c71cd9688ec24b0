"""State that is put away comes back (``tests/parity/test_scoring.py`` counts the bytes and has bf16)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.runtime import World
from tests.distributed import tiny


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "replicated"])
def test_state_comes_back_after_two_releases(world: World, distributed: bool) -> None:
    """Claim: an engine that releases what it has released trains on as one that never releases, to the bit.

    Its weights stay, also where they are the optimizer's masters (the replicated optimizer in fp32).
    """
    world = dataclasses.replace(world, parallel=ParallelConfig(distributed_optimizer=distributed))
    kept, released = (
        tiny.build(world, optimizer=dataclasses.replace(tiny.OPTIMIZER, offload=offload)) for offload in (False, True)
    )
    for step in range(3):
        expected = tiny.train(kept, range(step, step + 1))
        assert tiny.train(released, range(step, step + 1)) == expected
        assert all(parameter.untyped_storage().nbytes() for parameter in released.modules[0].parameters())
        released.release()
        released.release()
    weights = tiny.exported(kept)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny.exported(released).items())
