"""A packed step of supervised fine-tuning is the padded step: the same loss and the same gradients, in every layout.

What could break it: attention that looks over the border of a conversation, positions (three axes, with images) that go
on from the row before, a label that reads the first token of the next conversation, a loss that counts rows.
Blind spot: Transformer Engine's kernels, which run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.testing import GlooWorld
from tests.integration.packing_ranks import StepGradients, step_gradients

TOLERANCE = 1e-5
"""Of a gradient's norm: fp32 sums over 16 conversations in another order spread by about 1e-6."""


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


@pytest.fixture(scope="module")
def padded(gloo: GlooWorld) -> StepGradients:
    (found,) = gloo.run(step_gradients, 0, num_ranks=1, parallel=ParallelConfig())
    assert isinstance(found, StepGradients)
    return found


@pytest.mark.parametrize(
    ("layout", "per_row"),
    [
        (ParallelConfig(), 4),
        (ParallelConfig(tp=2, pp=2), 4),
        pytest.param(ParallelConfig(cp=2), 8, marks=pytest.mark.long),
        pytest.param(ParallelConfig(tp=2, sp="on"), 8, marks=pytest.mark.long),
    ],
    ids=["one", "TP2PP2", "CP2DP2", "TP2SP_DP2"],
)
def test_packed_rows_learn_what_padded_rows_learn(
    gloo: GlooWorld, padded: StepGradients, layout: ParallelConfig, per_row: int
) -> None:
    ranks = 1 if layout == ParallelConfig() else 4
    for found in gloo.run(step_gradients, per_row, num_ranks=ranks, parallel=layout):
        assert found.label_tokens == padded.label_tokens > 300
        assert found.loss == pytest.approx(padded.loss, rel=TOLERANCE)
        assert found.gradients.keys() == padded.gradients.keys()
        assert any("visual" in name for name in found.gradients)
        for name, gradient in found.gradients.items():
            wanted = padded.gradients[name]
            assert (gradient - wanted).norm() <= TOLERANCE * wanted.norm(), name
