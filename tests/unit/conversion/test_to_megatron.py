"""The plan of a checkpoint: which rank's file holds what, cut how; and that what is written is the plan.

That converted checkpoints load in Megatron is held by ``tests/distributed``; that they return bit for bit, by
``tests/integration/test_convert.py``. Here: who would read which file, which nothing but speed depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model_providers.qwen3_vl.mapping import weight_mappings
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.checkpoints import to_megatron as module
from prism_megatron.conversion.checkpoints.to_megatron import (
    MegatronPlan,
    checkpoint_tensors,
    layer_stages,
    plan_megatron,
)
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import Box
from prism_megatron.parity.tiny import MODELS, tiny_config
from tests.unit.conversion.held import Held

SHAPE = Qwen3VLShape.from_dict(tiny_config(**MODELS["MoE"]))
NUM_EXPERTS, NUM_LAYERS = 8, 4


@pytest.fixture(scope="module")
def mappings() -> Sequence[WeightMapping]:
    return weight_mappings(SHAPE, "hub")


@pytest.fixture(scope="module")
def source(mappings: Sequence[WeightMapping]) -> Held:
    torch.manual_seed(0)
    shapes = {name: shape for m in mappings for name, shape in zip(m.hf_names, m.hf_shapes or (), strict=True)}
    return Held({name: torch.randn(shape) for name, shape in shapes.items()})


def planned(
    mappings: Sequence[WeightMapping], source: Held, parallel: ParallelConfig, bucket_bytes: int = 10**9
) -> MegatronPlan:
    return plan_megatron(mappings, source, role="policy", parallel=parallel, bucket_bytes=bucket_bytes)


@pytest.mark.parametrize(
    ("parallel", "num_layers", "expected"),
    [
        (ParallelConfig(pp=2), 4, [0, 0, 1, 1]),
        (ParallelConfig(pp=2, vpp=2), 8, [0, 0, 1, 1, 0, 0, 1, 1]),
        (ParallelConfig(pp=2, vpp=3), 6, [0, 1, 0, 1, 0, 1]),
        (ParallelConfig(pp=3, first_stage_layers=1, last_stage_layers=2), 6, [0, 1, 1, 1, 2, 2]),
        (ParallelConfig(pp=2, vpp=2, first_stage_layers=2), 6, [0, 1, 1, 0, 1, 1]),
    ],
)
def test_virtual_stages_take_turns(parallel: ParallelConfig, num_layers: int, expected: list[int]) -> None:
    """Claim: layers go to stages as Megatron's interleaved schedule places them."""
    assert layer_stages(parallel, num_layers) == expected


def test_a_rank_finds_its_own_in_its_files(mappings: Sequence[WeightMapping], source: Held) -> None:
    """Claim: a stage's layers are in its files, vision and embedding in the first one's, the last norm and the output
    layer in the last one's; no file holds experts of two ranks, which have neighbouring ones."""
    plan = planned(mappings, source, ParallelConfig(tp=2, pp=2, ep=4))
    experts_of: dict[int, set[frozenset[int]]] = {}
    for file in plan.files:
        stage = int(file.name.split("_")[2])
        found: set[int] = set()
        for chunk in file.chunks:
            name = chunk.key.removeprefix("policy.")
            if name.startswith("decoder.layers."):
                assert stage == int(name.split(".")[2]) // 2, name
            else:
                assert stage == (0 if name.startswith(("vision_model.", "embedding.")) else 1), name
            if ".experts." in name:
                found.add(chunk.of_key.offset[0])
        experts_of.setdefault(stage, set()).add(frozenset(found))
    pairs = {frozenset((first, first + 1)) for first in range(0, NUM_EXPERTS, 2)}
    assert experts_of == {stage: {frozenset(), *pairs} for stage in (0, 1)}


@pytest.mark.parametrize(("ep", "etp", "parts"), [(1, None, 4), (2, None, 1), (2, 2, 2), (1, 1, 1)])
def test_experts_are_cut_for_their_own_ranks(
    mappings: Sequence[WeightMapping], source: Held, ep: int, etp: int | None, parts: int
) -> None:
    """Claim: a down projection has a chunk for each of its tensor-parallel ranks, which need not be as many as the
    attention's; an output projection is cut for those."""
    plan = planned(mappings, source, ParallelConfig(tp=4, ep=ep, etp=etp))
    chunks = [chunk for file in plan.files for chunk in file.chunks]
    down = [c for c in chunks if "layers.0.mlp.experts" in c.key and "fc2" in c.key and c.of_key.offset[0] == 3]
    assert len(down) == parts
    assert len([c for c in chunks if "decoder.layers.0.self_attention.linear_proj" in c.key]) == 4


def covered(boxes: Sequence[Box], shape: tuple[int, ...]) -> torch.Tensor:
    """How often each element lies in a box, which must lie in the shape."""
    count = torch.zeros(shape, dtype=torch.int8)
    for box in boxes:
        assert all(o + s <= n for o, s, n in zip(box.offset, box.size, shape, strict=True)), (box, shape)
        count[tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True))] += 1
    return count


@pytest.mark.parametrize("chunk_bytes", [2**24, 7000, 1])
def test_chunks_are_parts_of_their_tensors(
    mappings: Sequence[WeightMapping], source: Held, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: chunks cover every tensor once, and none is cut from more rows than the limit takes, or one."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    plan = planned([m for m in mappings if "layers.1." in m.parameter], source, ParallelConfig(tp=2))
    boxes: dict[str, list[Box]] = {}
    for file in plan.files:
        for chunk in file.chunks:
            boxes.setdefault(chunk.key, []).append(chunk.of_key)
            rows, *rest = chunk.of_parameter.size
            assert rows == 1 or rows * torch.Size(rest).numel() * 4 <= chunk_bytes
    for key, shape in checkpoint_tensors("policy", mappings).items():
        if key in boxes:
            assert covered(boxes[key], shape).eq(1).all(), key


def test_data_files_are_no_larger_than_asked_for(mappings: Sequence[WeightMapping], source: Held) -> None:
    """Claim: but for one larger chunk; they are numbered stage by stage, and the bytes they tell are their chunks'."""
    limit = 200_000
    plan = planned(mappings, source, ParallelConfig(pp=2), bucket_bytes=limit)
    for file in plan.files:
        sizes = [torch.Size(chunk.of_key.size).numel() * 4 for chunk in file.chunks]
        assert file.num_bytes == sum(sizes)
        assert file.num_bytes <= limit or len(sizes) == 1
    for stage in (0, 1):
        names = [file.name for file in plan.files if file.name.startswith(f"__{stage}_")]
        assert names == [f"__{stage}_{number}.distcp" for number in range(len(names))]
        assert len(names) > 2
    assert sum(file.num_bytes for file in plan.files) == sum(
        torch.Size(shape).numel() * dtype.itemsize for shape, dtype in plan.tensors.values()
    )


@pytest.mark.parametrize("chunk_bytes", [2**24, 5000])
def test_what_is_written_is_the_plan(
    mappings: Sequence[WeightMapping],
    source: Held,
    chunk_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Claim: every chunk holds the numbers of its box, and no more than these. Oracle: the op, on whole tensors."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    kept = [m for m in mappings if "decoder.layers.2." in m.parameter or m.parameter.startswith("output_layer")]
    plan = planned(kept, source, ParallelConfig(tp=2, ep=2, etp=2))
    for file in plan.files:
        lengths = file.run(tmp_path, lambda _: None)
        begin = 0
        for chunk, length in zip(file.chunks, lengths, strict=True):
            with (tmp_path / file.name).open("rb") as opened:
                opened.seek(begin)
                content = opened.read(length)
            (tmp_path / "alone").write_bytes(content)
            tensor = torch.load(tmp_path / "alone", weights_only=True)
            (whole,) = chunk.mapping.op.split(chunk.mapping.read(source), 1)
            box = chunk.of_parameter
            expected = whole[tuple(slice(o, o + s) for o, s in zip(box.offset, box.size, strict=True))]
            assert torch.equal(tensor, expected.reshape(chunk.of_key.size)), chunk.key
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            begin += length
    places = plan.written([[10] * len(file.chunks) for file in plan.files])
    assert [place.offset for place in places if place.file == plan.files[0].name][:3] == [0, 10, 20]
