"""Whatever the sizes of a model, every weight returns bit for bit from the shards of any layout of ranks.

Random odd sizes: heads, groups, head and ffn widths, experts, DeepStack taps, vocabulary, tied or not, dense, with
experts in each layout on disk, and discriminators. The oracle is the tensor itself, of random bits (NaNs included).
Expert parallelism shares out whole experts, each with mappings of its own, so it needs no case here. Blind spot: more
tensor-parallel ranks than key/value heads.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_providers.moe_discriminator.mapping import weight_mappings as discriminator_mappings
from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.mapping import weight_mappings
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape, TextShape, VisionShape
from prism_megatron.conversion.expert_layout import ExpertLayout, detect_expert_layout
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import Box, Column
from prism_megatron.conversion.verify import check_names
from tests.unit.conversion.held import Held

LAYOUTS: tuple[ExpertLayout, ...] = ("transformers", "hub", "per_expert")
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
small, tp_sizes = st.integers(1, 3), st.sampled_from([1, 2, 3, 4])


@st.composite
def shapes(draw: st.DrawFn, *, tp: int, etp: int) -> Qwen3VLShape:
    """A model that divides by ``tp`` (its experts by ``etp``) and is odd in everything else."""
    groups = tp * draw(small)
    experts = draw(st.sampled_from([0, 1, 2, 5]))
    hidden = draw(st.integers(2, 9))
    text = TextShape(
        num_layers=draw(st.integers(1, 2)),
        hidden=hidden,
        ffn=tp * draw(small),
        heads=groups * draw(small),
        kv_heads=groups,
        head_dim=draw(small),
        vocab=draw(st.sampled_from([1, 127, 128, 131, 256])),
        eps=1e-6,
        theta=1e4,
        mrope_section=(1, 1, 1),
        tied=draw(st.booleans()),
        num_experts=experts,
        experts_per_token=min(1, experts),
        expert_ffn=etp * draw(small) if experts else 0,
    )
    heads = tp * draw(small)
    depth = draw(st.integers(1, 3))
    vision = VisionShape(
        depth=depth,
        hidden=heads * draw(small),
        heads=heads,
        ffn=tp * draw(small),
        patch=draw(small),
        temporal_patch=draw(small),
        channels=draw(small),
        merge=2,
        num_position_embeddings=draw(st.sampled_from([1, 4, 9])),
        out_hidden=hidden,
        taps=tuple(range(draw(st.integers(0, depth)))),
    )
    return Qwen3VLShape(text, vision, 1, 2, 3, 4, 5, 6, dtype="bfloat16")


def random_tensors(mappings: list[WeightMapping], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random bits for every name."""
    torch.manual_seed(seed)
    info = torch.iinfo(BITS[dtype])
    shapes_of: dict[str, tuple[int, ...]] = {}
    for mapping in mappings:
        shapes_of |= dict(zip(mapping.hf_names, mapping.hf_shapes or (), strict=True))
    return {
        name: torch.randint(info.min, info.max, shape, dtype=BITS[dtype]).view(dtype)
        for name, shape in shapes_of.items()
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(BITS[one.dtype]), other.contiguous().view(BITS[one.dtype])
    )


def cut(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True))]


def check_round_trip(mappings: list[WeightMapping], source: Held, *, tp: int, etp: int) -> dict[str, Tensor]:
    """Of each mapping: shards merge to the tensors, from ``tp`` ranks as from one, and are the pieces of the one.

    Returns the global tensors by parameter.
    """
    whole_of = {}
    for mapping in mappings:
        tensors = mapping.read(source)
        ranks = etp if ".experts." in mapping.parameter else tp
        shards, (whole,) = mapping.op.split(tensors, ranks), mapping.op.split(tensors, 1)
        for held in (shards, [whole]):
            for before, after in zip(tensors, mapping.op.merge(held), strict=True):
                assert same_bits(before, after), mapping
        whole_of[mapping.parameter] = whole
        if isinstance(mapping.op, Column):  # a vocabulary has further rows of zeros where tp does not divide 128
            missing = mapping.op.padded_rows(ranks) - len(whole)
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
        for shard, boxes in zip(shards, mapping.op.pieces(tuple(whole.shape), ranks), strict=True):
            assert same_bits(torch.cat([cut(whole, box) for box in boxes]), shard), mapping
    return whole_of


@settings(deadline=None, max_examples=50)
@given(
    data=st.data(),
    tp=tp_sizes,
    etp=tp_sizes,
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(list(BITS)),
    seed=st.integers(0, 2**16),
)
def test_policies(
    *, data: st.DataObject, tp: int, etp: int, layout: ExpertLayout, dtype: torch.dtype, seed: int
) -> None:
    """Claim: weights in any layout of experts are recognised, come back from any split, and make the same parameters
    as the same weights written in any other layout."""
    shape = data.draw(shapes(tp=tp, etp=etp))
    mappings = weight_mappings(shape, layout)
    source = Held(random_tensors(mappings, dtype, seed))
    assert detect_expert_layout(source, shape) == (layout if shape.text.experts else None)
    check_names(mappings, source)
    wholes = check_round_trip(mappings, source, tp=tp, etp=etp)
    for other in LAYOUTS:
        rewritten: dict[str, Tensor] = {}
        for mapping in weight_mappings(shape, other):
            merged = mapping.op.merge([wholes[mapping.parameter]])
            for name, part, full in zip(mapping.hf_names, merged, mapping.hf_shapes or (), strict=True):
                if mapping.expert is None:
                    rewritten[name] = part
                else:
                    rewritten.setdefault(name, part.new_empty(full))[mapping.expert] = part
        read = Held(rewritten)
        assert detect_expert_layout(read, shape) == (other if shape.text.experts else None)
        for mapping in weight_mappings(shape, other):
            assert same_bits(mapping.op.split(mapping.read(read), 1)[0], wholes[mapping.parameter])


@settings(deadline=None, max_examples=20)
@given(data=st.data(), tp=tp_sizes, towers=st.builds(Towers, small, small, st.just(1)), seed=st.integers(0, 2**16))
def test_discriminators(*, data: st.DataObject, tp: int, towers: Towers, seed: int) -> None:
    """Claim: as for policies; their experts are as wide as the dense MLP."""
    shape = data.draw(shapes(tp=tp, etp=1))
    mappings = discriminator_mappings(shape, towers)
    source = Held(random_tensors(mappings, torch.bfloat16, seed))
    check_names(mappings, source)
    wholes = check_round_trip(mappings, source, tp=tp, etp=tp)
    assert len(wholes) == len(mappings)
