"""Every op but ``Transposed`` is a rearrangement of rows, and the rearrangement is read off the op."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.conversion.checkpoints.row_order import origins_of, parameter_shape, runs_of, targets_of
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import (
    Column,
    GateUp,
    GroupedQKV,
    Op,
    PatchEmbed,
    Replicated,
    Row,
    VisionQKV,
    vocabulary,
)

CASES: list[tuple[Op, tuple[tuple[int, ...], ...]]] = [
    (Replicated(), ((7,),)),
    (Column(10), ((10, 3),)),
    (vocabulary(130), ((130, 2),)),
    (Row(), ((5, 6),)),
    (GroupedQKV(kv_heads=2, head_dim=4), ((24, 3), (8, 3), (8, 3))),
    (GateUp(), ((6, 5), (6, 5))),
    (VisionQKV(heads=3), ((18, 4),)),
    (VisionQKV(heads=3), ((18,),)),
    (PatchEmbed((3, 2, 4, 4)), ((8, 3, 2, 4, 4),)),
]


@pytest.mark.parametrize(("op", "shapes"), CASES, ids=lambda value: type(value).__name__)
def test_rows_put_together_are_what_the_op_makes(op: Op, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Claim: any range of rows, made by runs, is that of ``split``; and back, that of ``merge``. Exact.

    Oracle: the op itself, on random tensors. Blind spot: an op that moves columns would not be told from a wrong one.
    """
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in shapes]
    names = tuple(f"t{number}" for number in range(len(tensors)))
    mapping = WeightMapping(names, "p", op, hf_shapes=shapes)
    (whole,) = op.split(tensors, 1)
    assert parameter_shape(mapping) == whole.shape
    for start, stop in ((0, len(whole)), (1, len(whole) - 1), (len(whole) // 2, len(whole) // 2 + 1)):
        made = torch.full((stop - start, *whole.shape[1:]), torch.nan)
        for run in targets_of(mapping, start, stop):
            target = made[run.target - start : run.target - start + run.count]
            part = torch.zeros(()) if run.part is None else tensors[run.part][run.origin : run.origin + run.count]
            target.copy_(part if run.part is None else part.reshape(target.shape))
        assert torch.equal(made, whole[start:stop])
    for number, tensor in enumerate(tensors):
        start, stop = 1, len(tensor)
        back = torch.full_like(tensor[start:stop], torch.nan)
        found = list(origins_of(mapping, number, start, stop))
        assert [run.origin for run in found] == sorted(run.origin for run in found)
        for run in found:
            rows = whole[run.target : run.target + run.count]
            target = back[run.origin - start : run.origin - start + run.count]
            target.copy_(rows.reshape(target.shape))
        assert torch.equal(back, tensor[start:stop])


def test_runs_are_as_long_as_they_can_be() -> None:
    """Claim: a copy is one run, a gate and an up projection two, padding one: reads are few and large."""
    copies = WeightMapping(("a",), "p", Row(), hf_shapes=((5, 6),))
    gated = WeightMapping(("a", "b"), "p", GateUp(), hf_shapes=((6, 5), (6, 5)))
    padded = WeightMapping(("a",), "p", vocabulary(130), hf_shapes=((130, 2),))
    assert [len(runs_of(mapping)) for mapping in (copies, gated, padded)] == [1, 2, 2]
