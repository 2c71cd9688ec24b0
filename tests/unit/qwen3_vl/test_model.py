"""What a policy's head gives (its numbers are held against transformers in ``tests/parity``)."""

from __future__ import annotations

import torch

from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from tests.distributed import tiny


def test_columns_past_the_vocabulary_are_never_drawn(world: World) -> None:
    """Claim: of 128 columns the last 31 hold the dtype's minimum, and no other does."""
    engine = tiny.build(world, optimizer=None)
    batches, _ = tiny.batches_of(world, step=0)
    output = engine.forward(
        batches[:1], lambda output, _batch: LossOutput(output.logits().sum(), rows={"logits": output.logits()})
    )
    logits = output.rows[0]["logits"]
    assert logits.shape[-1] == 128
    lowest = logits == torch.finfo(logits.dtype).min
    assert lowest[..., tiny.VOCAB :].all() and not lowest[..., : tiny.VOCAB].any()
