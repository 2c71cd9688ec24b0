"""``python -m tests.parity.preset_counts NAME …``: weights of each preset at TP8·PP4, counted on the meta device.

One process takes the places of tensor-parallel rank 0 of the four stages in turn, in a world of 32 that does not exist
(torch's fake process group). Shards are put together by the ops that export them: a shard counts once per
tensor-parallel rank, replicated weights once, and rows that only pad the vocabulary not at all. The eight
tensor-parallel ranks of a stage share the experts of a layer out (EP8), so an expert counts once per such rank.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections import Counter

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from model_providers.qwen3_vl.model import Qwen3VLModel
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import TextShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.presets import preset
from prism_megatron.conversion.ops import Op
from prism_megatron.engine.host.cpu import open_cpu_door

TP, PP = 8, 4


def layout(text: TextShape) -> ParallelConfig:
    """Where the layers do not divide, the first and the last stage take less than those between."""
    ep = TP if text.experts else 1
    end = text.num_layers // PP if text.num_layers % PP else None
    return ParallelConfig(tp=TP, pp=PP, ep=ep, first_stage_layers=end, last_stage_layers=end)


def build_stage(provider: Qwen3VLProvider, parallel: ParallelConfig, stage: int) -> Qwen3VLModel:
    """What tensor-parallel rank 0 of a stage holds, without memory for it."""
    dist.init_process_group("fake", store=FakeStore(), rank=stage * TP, world_size=TP * PP)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=TP,
        pipeline_model_parallel_size=PP,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.expert_tp,
        create_gloo_process_groups=False,
    )
    try:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        with torch.device("meta"):
            config = provider.transformer_config(parallel, torch.bfloat16)
            return provider.build_chunk(
                config, groups, pre_process=stage == 0, post_process=stage == PP - 1, vp_stage=None
            )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def global_names(name: str, parallel: ParallelConfig, num_experts: int) -> list[str]:
    """A parameter's names in the whole model: several for an expert's, which another expert has on each rank."""
    found = re.search(r"(?<=\.local_experts\.)\d+", name)
    if found is None:
        return [name]
    first = range(0, num_experts, num_experts // parallel.ep)
    return [name[: found.start()] + str(start + int(found[0])) + name[found.end() :] for start in first]


@functools.cache
def merged_shapes(op: Op, shard: torch.Size, ranks: int) -> list[torch.Size]:
    """Shapes of the full tensors that the shards of ``ranks`` ranks make."""
    return [tensor.shape for tensor in op.merge([torch.empty(shard, device="meta")] * ranks)]


def count(size: str) -> int:
    """All weights of a preset, of which none is missing, misshapen, or on two stages."""
    provider, text = Qwen3VLProvider(preset(size)), preset(size).text
    parallel = layout(text)
    mappings = {mapping.parameter: mapping for mapping in provider.weight_mappings()}
    found: Counter[str] = Counter()
    elements = 0
    for stage in range(PP):
        chunk = build_stage(provider, parallel, stage)
        for local_name, parameter in chunk.named_parameters():
            assert parameter.device.type == "meta", local_name
            if local_name in chunk.tied_copies:
                continue
            for name in global_names(local_name, parallel, text.num_experts):
                mapping = mappings[name]
                ranks = parallel.expert_tp if mapping.expert is not None else TP
                shapes = merged_shapes(mapping.op, parameter.shape, ranks)
                for merged, shape in zip(shapes, mapping.hf_shapes or (), strict=True):
                    assert merged == (shape if mapping.expert is None else shape[1:]), name
                    elements += merged.numel()
                found[name] += 1
    assert found == Counter(mappings.keys())
    return elements


if __name__ == "__main__":
    open_cpu_door()
    print(json.dumps({name: count(name) for name in sys.argv[1:]}))
