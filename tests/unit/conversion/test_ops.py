"""Every op is exact both ways at every tensor-parallel size, and lays shards out as Megatron reads them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.conversion.ops import (
    Column,
    FusedGateUp,
    GateUp,
    GroupedQKV,
    Op,
    PatchEmbed,
    Replicated,
    Row,
    Transposed,
    VisionQKV,
    vocabulary,
)

TP_SIZES = st.sampled_from([1, 2, 4])
SEEDS = st.integers(0, 2**16)
exact = settings(deadline=None, max_examples=25)


def assert_round_trip(op: Op, tensors: list[torch.Tensor], tp_size: int) -> list[torch.Tensor]:
    shards = op.split(tensors, tp_size)
    assert len(shards) == tp_size
    merged = op.merge(shards)
    assert len(merged) == len(tensors)
    for before, after in zip(tensors, merged, strict=True):
        assert torch.equal(before, after)
    return shards


@exact
@given(tp_size=TP_SIZES, rows=st.integers(1, 13), seed=SEEDS, bias=st.booleans())
def test_column_pads_any_number_of_rows(tp_size: int, rows: int, seed: int, bias: bool) -> None:
    """Claim: shards are equal in size whatever the vocabulary, and the padding never comes back."""
    torch.manual_seed(seed)
    tensor = torch.randn(rows) if bias else torch.randn(rows, 3)
    shards = assert_round_trip(Column(rows), [tensor], tp_size)
    assert {len(shard) for shard in shards} == {-(-rows // tp_size)}


@exact
@given(tp_size=st.sampled_from([1, 2, 3, 4, 8, 64, 128]), size=st.integers(1, 400), seed=SEEDS)
def test_a_vocabulary_is_padded_alike_at_every_tp_that_divides_128(tp_size: int, size: int, seed: int) -> None:
    """Claim: the shards together are the same tensor, zeros after the last word, unless tp does not divide 128."""
    torch.manual_seed(seed)
    tensor = torch.randn(size, 2)
    together = torch.cat(assert_round_trip(vocabulary(size), [tensor], tp_size))
    if tp_size != 3:
        assert torch.equal(together, vocabulary(size).split([tensor], 1)[0])
    multiple = 3 * 128 if tp_size == 3 else 128
    assert len(together) % multiple == 0 and len(together) < size + multiple
    assert not together[size:].any()


@exact
@given(tp_size=TP_SIZES, blocks=st.integers(1, 3), seed=SEEDS)
def test_row_and_gate_up_and_replicated(tp_size: int, blocks: int, seed: int) -> None:
    """Claim: row shards split dimension 1; each gate/up shard holds its own gate above its own up."""
    torch.manual_seed(seed)
    gate, up = torch.randn(2, 4 * blocks, 3).unbind()
    assert_round_trip(Row(), [gate.t()], tp_size)
    assert_round_trip(Replicated(), [gate], tp_size)
    shards = assert_round_trip(GateUp(), [gate, up], tp_size)
    fused = assert_round_trip(FusedGateUp(), [torch.cat([gate, up])], tp_size)
    assert all(torch.equal(one, other) for one, other in zip(fused, shards, strict=True))
    part = 4 * blocks // tp_size
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, torch.cat([gate[rank * part :][:part], up[rank * part :][:part]]))


@exact
@given(tp_size=TP_SIZES, groups=st.sampled_from([2, 4]), per_group=st.integers(1, 3), seed=SEEDS)
def test_grouped_qkv(tp_size: int, groups: int, per_group: int, seed: int) -> None:
    """Claim: group g holds its query heads, then key g, then value g; tp may exceed the number of groups."""
    torch.manual_seed(seed)
    head_dim = 4
    query = torch.randn(groups * per_group * head_dim, 5)
    key, value = torch.randn(2, groups * head_dim, 5).unbind()
    shards = assert_round_trip(GroupedQKV(kv_heads=groups, head_dim=head_dim), [query, key, value], tp_size)
    fused = torch.cat(shards).unflatten(0, (groups, per_group + 2, head_dim))
    for group in range(groups):
        width = per_group * head_dim
        assert torch.equal(fused[group, :-2].flatten(0, 1), query[group * width :][:width])
        assert torch.equal(fused[group, -2], key[group * head_dim :][:head_dim])
        assert torch.equal(fused[group, -1], value[group * head_dim :][:head_dim])


@exact
@given(tp_size=TP_SIZES, seed=SEEDS, bias=st.booleans())
def test_vision_qkv_interleaves_per_head(tp_size: int, seed: int, bias: bool) -> None:
    """Claim: head h of the fused tensor is query h, key h, value h, for weights and biases alike."""
    torch.manual_seed(seed)
    heads, head_dim = 4, 2
    tensor = torch.randn(3 * heads * head_dim) if bias else torch.randn(3 * heads * head_dim, 5)
    shards = assert_round_trip(VisionQKV(heads), [tensor], tp_size)
    fused = torch.cat(shards).unflatten(0, (heads, 3, head_dim))
    for which, part in enumerate(tensor.chunk(3)):
        assert torch.equal(fused[:, which].flatten(0, 1), part)


def test_patch_embed_is_the_convolution_as_a_matrix() -> None:
    kernel = (3, 2, 4, 4)
    weight = torch.randn(5, *kernel)
    (shard,) = assert_round_trip(PatchEmbed(kernel), [weight], 1)
    patch = torch.randn(1, *kernel)
    torch.testing.assert_close(torch.nn.functional.conv3d(patch, weight).flatten(1), patch.flatten(1) @ shard.t())


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into 4 shards"):
        Row().split([torch.zeros(2, 6)], 4)


@exact
@given(tp_size=TP_SIZES, blocks=st.integers(1, 3), seed=SEEDS)
def test_pieces_are_where_shards_lie_in_the_global_tensor(tp_size: int, blocks: int, seed: int) -> None:
    """Claim: cut from the global tensor and joined, a rank's boxes are its shard; ranks of a split op share nothing."""
    torch.manual_seed(seed)
    rows = 8 * blocks
    one, two, bias, image = (
        torch.randn(rows, rows),
        torch.randn(rows, rows),
        torch.randn(3 * rows),
        torch.randn(2, 3, 2, 4, 4),
    )
    cases: list[tuple[Op, list[torch.Tensor]]] = [
        (Replicated(), [bias]),
        (Column(rows), [one]),
        (Row(), [one]),
        (GroupedQKV(kv_heads=4, head_dim=2 * blocks), [one, two, two]),
        (GateUp(), [one, two]),
        (FusedGateUp(), [one]),
        (VisionQKV(heads=4), [bias]),
        (PatchEmbed((3, 2, 4, 4)), [image]),
        (Transposed(FusedGateUp()), [one]),
        (Transposed(Row()), [one]),
    ]
    for op, tensors in cases:
        (whole,) = op.split(tensors, 1)
        covered = torch.zeros(whole.shape)
        for shard, boxes in zip(op.split(tensors, tp_size), op.pieces(tuple(whole.shape), tp_size), strict=True):
            places = [tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True)) for box in boxes]
            assert torch.equal(torch.cat([whole[place] for place in places]), shard), op
            for place in places:
                covered[place] += 1
        copies = tp_size if isinstance(op, Replicated | PatchEmbed) else 1
        assert torch.equal(covered, torch.full_like(covered, copies)), op


def test_pieces_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into 4 shards"):
        GateUp().pieces((6, 3), 2)
