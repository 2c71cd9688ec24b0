"""Attention over context-parallel ranks against one rank, for packed sequences that go on from a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.layers.attention import SDPACoreAttention, Sequences
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.layout import zigzag
from prism_megatron.testing import GlooWorld

SLOTS = (16, 8, 8, 24)
PREFIXES = ((0, 0), (0, 13), (0, 13), (0, 0))
"""The second and third go on from the first, whose last three tokens are padding."""


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def attend(world: World, prefixes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Of this rank's tokens: their numbers, the outputs, and the gradients of queries, keys and values."""
    cp, generator = world.parallel.cp, torch.Generator().manual_seed(1)
    size = sum(SLOTS)
    whole = [torch.randn(size, 1, heads, 16, generator=generator) for heads in (8, 4, 4)]
    weights = torch.randn(size, 1, 8 * 16, generator=generator)
    tokens = torch.from_numpy(zigzag(SLOTS, cp_size=cp, cp_rank=world.cp_rank))
    core = SDPACoreAttention(
        config=SimpleNamespace(attention_dropout=0.0, context_parallel_size=cp),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=world.parallel.cp_comm,
        pg_collection=world.groups,
    )
    own = [x[tokens].requires_grad_() for x in whole]
    output = core(*own, Sequences.of(SLOTS, prefixes=prefixes, cp_size=cp, device=world.device))
    return [tokens, output.detach(), *torch.autograd.grad((output * weights[tokens]).sum(), own)]


@pytest.mark.parametrize("prefixes", [(), PREFIXES], ids=["without prefixes", "with prefixes"])
@pytest.mark.parametrize("comm", ["all_gather", "a2a"])
@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_attention_is_that_of_one_rank(
    gloo: GlooWorld, cp: int, comm: str, prefixes: tuple[tuple[int, int], ...]
) -> None:
    """Claim: outputs and gradients of every token to 1e-5, whichever rank holds it."""
    _, *expected = gloo.run(attend, prefixes, num_ranks=1)[0]
    parallel = ParallelConfig(cp=cp, cp_comm=comm)  # type: ignore[arg-type]  # the literals above
    tokens, *found = zip(*gloo.run(attend, prefixes, num_ranks=cp, parallel=parallel), strict=True)
    order = torch.cat(tokens).argsort()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(ours)[order], theirs, rtol=0, atol=1e-5)
