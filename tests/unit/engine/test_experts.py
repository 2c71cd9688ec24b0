"""What an expert layer keeps of a pass (its numbers are held against transformers in ``tests/parity``)."""

from __future__ import annotations

import gc
import weakref

import torch

from prism_megatron.engine.layers.experts import ExpertLayer
from prism_megatron.engine.layers.recompute import checkpointed
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


def test_a_layer_that_is_recomputed_lets_go_too(world: World) -> None:
    """Claim: after backward, the dispatcher of a layer that was computed again holds no graph.

    torch ends that second forward pass before its last line. Otherwise gates would hold what comes before them in every
    layer until the step is over: attention's activations of the whole depth.
    """
    (module,) = checkpoint_ranks.build(world, "experts").modules
    layer = next(part for part in module.modules() if isinstance(part, ExpertLayer))
    sequence = torch.zeros(6, 1, dtype=torch.long, device=world.device)
    passes: list[bool] = []

    def part(hidden: torch.Tensor) -> torch.Tensor:
        passes.append(torch.is_grad_enabled())
        output: torch.Tensor = layer(hidden * 2.0, sequence, torch.tensor([6], device=world.device))[0]
        return output

    checkpointed(part, torch.randn(6, 1, 64, device=world.device, requires_grad=True)).sum().backward()
    assert len(passes) == 2, "blind: the layer was not computed again"
    held = [name for name, value in vars(layer.token_dispatcher).items() if getattr(value, "requires_grad", False)]
    assert held == []
