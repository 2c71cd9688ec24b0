"""What each rank does in the model parity tests: build, load, run one schedule, hand back logits and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from model_providers.qwen3_vl import deepstack, model, provider
from model_providers.qwen3_vl.deepstack import VisualRows
from model_providers.qwen3_vl.model import Qwen3VLModel
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from model_providers.qwen3_vl.vision import VisionMLP
from prism_megatron.conversion.ops import PatchEmbed, Replicated
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.runtime import World
from tests.parity.qwen3_vl_oracle import probe, shape_of, tiny_batch, tiny_model


@dataclass(frozen=True)
class RankResult:
    """``logits[i]`` of micro-batch i on the last stage; gradients of this rank's shards, by global parameter name."""

    tp_rank: int
    logits: list[Tensor]
    gradients: dict[str, Tensor]
    payload_rows: list[int]


def build(world: World, config: Mapping[str, Any]) -> tuple[TransformerConfig, list[Qwen3VLModel]]:
    """This rank's chunks with the weights of ``tiny_model``."""
    policy = Qwen3VLProvider(shape_of(config))
    transformer_config = policy.transformer_config(world.parallel, torch.float32)
    vpp, pp = world.parallel.vpp, world.parallel.pp
    chunks = [
        policy.build_chunk(
            transformer_config,
            world.groups,
            pre_process=world.is_first_stage and stage == 0,
            post_process=world.is_last_stage and stage == vpp - 1,
            vp_stage=stage if vpp > 1 and pp > 1 else None,
        )
        for stage in range(vpp)
    ]
    weights = tiny_model(config).state_dict()
    shards = {
        mapping.parameter: mapping.op.split([weights[name] for name in mapping.hf_names], world.parallel.tp)
        for mapping in policy.weight_mappings()
    }
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.data.copy_(shards[chunk.tied_copies.get(name, name)][world.tp_rank])
    return transformer_config, chunks


def run_cases(world: World, config: Mapping[str, Any], cases: Sequence[str]) -> RankResult:
    """Forward and backward of one micro-batch per case; the loss is ``probe``'s sum with the logits."""
    transformer_config, chunks = build(world, config)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    wrapped = [
        DistributedDataParallel(transformer_config, ddp_config, chunk, pg_collection=world.groups) for chunk in chunks
    ]
    multiple = world.parallel.tp if transformer_config.sequence_parallel else 1
    batches = [tiny_batch(case, multiple_of=multiple) for case in cases]
    logits: list[Tensor] = []
    payload_rows: list[int] = []

    def loss_of(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits.append(output.detach().clone())
        columns = output.shape[-1]
        weights = probe(batch, shape_of(config).text.vocab)
        weights = torch.nn.functional.pad(weights, (0, columns * world.parallel.tp - weights.shape[-1]))
        mine = weights[..., world.tp_rank * columns :][..., :columns].transpose(0, 1)
        return (output * mine).sum(), torch.tensor(1), {}

    def forward_step(iterator: Any, chunk: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = chunk(batch)
        payload_rows.append(len(output))
        return output, lambda tensor: loss_of(tensor, batch)

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=wrapped,
        num_microbatches=len(batches),
        seq_length=1,  # not read: the payload's length varies
        micro_batch_size=1,
        forward_only=False,
        pg_collection=world.groups,
        **_communicator(world, transformer_config),
    )
    finalize_model_grads(wrapped, pg_collection=world.groups)
    gradients = {name: parameter.main_grad.clone() for chunk in chunks for name, parameter in chunk.named_parameters()}
    return RankResult(world.tp_rank, logits, gradients, payload_rows)


def _communicator(world: World, config: TransformerConfig) -> dict[str, Any]:
    """Megatron's pipelined schedules want a communicator whenever the groups are passed."""
    if world.parallel.pp == 1:
        return {}
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    return {"p2p_communicator": P2PCommunicator(pp_group=world.groups.pp, config=config)}


def gathered(results: Sequence[RankResult], config: Mapping[str, Any], cases: Sequence[str]) -> list[Tensor]:
    """Logits ``[B, S, V]`` of each case from all ranks' results, without the columns that pad the vocabulary."""
    vocab = shape_of(config).text.vocab
    last_stage = sorted((result for result in results if result.logits), key=lambda result: result.tp_rank)
    return [
        torch.cat([result.logits[index] for result in last_stage], dim=-1)[..., :vocab].transpose(0, 1)
        for index in range(len(cases))
    ]


def hf_gradients(results: Sequence[RankResult], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Gradients under Hugging Face names, merged by the ops that export weights; every name exactly once."""
    named: dict[str, Tensor] = {}
    for mapping in Qwen3VLProvider(shape_of(config)).weight_mappings():
        holders = {r.tp_rank: r.gradients[mapping.parameter] for r in results if mapping.parameter in r.gradients}
        merged = mapping.op.merge([holders[tp_rank] for tp_rank in sorted(holders)])
        for name, gradient in zip(mapping.hf_names, merged, strict=True):
            assert name not in named
            named[name] = gradient
    return named


def replica_spread(results: Sequence[RankResult], config: Mapping[str, Any]) -> float:
    """Largest relative difference between the copies of one whole parameter's gradient on different ranks."""
    worst = 0.0
    for mapping in Qwen3VLProvider(shape_of(config)).weight_mappings():
        if isinstance(mapping.op, Replicated | PatchEmbed):
            first, *others = (r.gradients[mapping.parameter] for r in results if mapping.parameter in r.gradients)
            for other in others:
                worst = max(worst, float((other - first).norm() / (first.norm() + 1e-12)))
    return worst


def run_broken(world: World, defect: str, config: Mapping[str, Any], cases: Sequence[str]) -> RankResult:
    """``run_cases`` with one defect put back, by its name in ``test_the_comparison_sees_each_defect``."""
    with pytest.MonkeyPatch.context() as patch:
        if defect == "no DeepStack":
            patch.setattr(VisualRows, "add", lambda _self, hidden, _rows: hidden)
        elif defect == "plain RoPE":
            patch.setattr(deepstack, "row_positions", lambda visual, _frames: np.tile(np.arange(len(visual)), (3, 1)))
        elif defect == "tanh GELU in mergers":
            patch.setattr(VisionMLP, "__init__", _with_tanh(VisionMLP.__init__))
        elif defect == "taps sliced under SP":
            patch.setattr(model, "copy_to_tensor_model_parallel_region", lambda tap, **_group: tap)
        elif defect == "batched p2p under VPP":
            patch.setattr(provider, "TransformerConfig", _batched_p2p)
        return run_cases(world, config, cases)


def _with_tanh(original: Callable[..., None]) -> Callable[..., None]:
    def build(self: VisionMLP, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **(keywords | {"gelu": "tanh"}))

    return build


def _batched_p2p(**settings: Any) -> TransformerConfig:
    return TransformerConfig(**(settings | {"overlap_p2p_comm": False, "batch_p2p_comm": True}))
