"""What an expert layer keeps of a pass (its numbers are held against transformers in ``tests/parity``)."""

from __future__ import annotations

import gc
import weakref

import torch

from prism_megatron.engine.layers.experts import ExpertLayer
from prism_megatron.engine.runtime import World
from tests.distributed import checkpoint_ranks


def test_a_layer_lets_go_of_its_graph(world: World) -> None:
    """Claim: when the output of a layer is gone so is its graph, although Megatron's dispatcher keeps what it saw."""
    (module,) = checkpoint_ranks.build(world, "experts").modules
    layer = next(part for part in module.modules() if isinstance(part, ExpertLayer))
    hidden = torch.randn(6, 1, 64, device=world.device, requires_grad=True)
    graph_holds = weakref.ref(hidden)
    sequence = torch.zeros(6, 1, dtype=torch.long, device=world.device)
    output, _ = layer(hidden, sequence, torch.tensor([6], device=world.device))
    assert output.requires_grad
    del hidden, output
    gc.collect()
    assert graph_holds() is None
