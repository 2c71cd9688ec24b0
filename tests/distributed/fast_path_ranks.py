"""What ranks do in the tests of faster ways: one pass, with twins in the place of kernels that need a GPU.

A twin computes in torch what the kernel is documented to compute, called as Megatron calls it. Where Megatron has the
plain form itself, that is the twin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.tensor_parallel import all_to_all, layers
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch import Tensor

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.engine.batch import collate
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.host.fast_paths import FastPaths
from prism_megatron.engine.host.weight_gradients import WeightGradientsOnCpu
from prism_megatron.engine.layers.experts import ExpertLayer
from prism_megatron.engine.layers.te_twins import PERMUTATION, ROUTER, indices_on_the_cpu
from prism_megatron.engine.provider import LossFn, LossOutput, ModelProvider
from prism_megatron.engine.runtime import World
from tests.distributed import checkpoint_ranks, tiny

Role = Literal["dense policy", "policy with experts", "discriminator"]


@dataclass(frozen=True)
class Pass:
    """Of two passes that make up a step: the loss, whole gradients by name, and how often each twin was called."""

    loss: float
    gradients: dict[str, Tensor]
    calls: Counter[str]


def run_pass(world: World, fast: FastPaths, role: Role, apex: bool, dtype: torch.dtype) -> Pass:
    """A step's gradients, from all but one micro-batch and from the last one.

    Weight gradients are added by a twin of apex's kernel, or by what a CPU has instead.
    """
    calls: Counter[str] = Counter()
    with twins(calls, _add_weight_gradient if apex else WeightGradientsOnCpu.wgrad_gemm_accum_fp32):
        model = provider(role, fast)
        engine = MegatronEngine(
            name=role, provider=model, world=world, dtype=dtype, optimizer=OptimizerConfig(), total_steps=1,
            fast=fast,
        )  # fmt: skip
        engine.load_hf(tiny.weights(model))
        batches, policy_loss = tiny.batches_of(world, 0)
        loss: LossFn = policy_loss
        if role == "discriminator":
            everything = [row for row, _ in tiny.rows(0)]
            share = everything[world.dp_rank :: world.dp_size]
            batches = [
                collate([row], pad_token_id=tiny.PAD, multiple_of=world.parallel.tp, device=world.device,
                        tower_ids=[place % 2])
                for place, row in enumerate(share)
            ]  # fmt: skip
            loss = _squared_scores
        outputs = [
            engine.forward_backward(batches[:-1], loss, more=True),
            engine.forward_backward(batches[-1:], loss, adds=True),
        ]
    assert not any(kept(layer) for chunk in engine.modules for layer in chunk.modules())
    return Pass(sum(out.sums["loss"] for out in outputs), dict(engine.export_gradients()), calls)


def provider(role: Role, fast: FastPaths) -> ModelProvider:
    execution = Execution(fast=fast)
    if role == "discriminator":
        return DiscriminatorProvider(
            tiny.provider().shape, checkpoint_ranks.TOWERS, head_dropout=0.0, execution=execution
        )
    config = tiny.CONFIG if role == "dense policy" else checkpoint_ranks.EXPERTS_CONFIG
    return Qwen3VLProvider(Qwen3VLShape.from_dict(config), execution=execution)


def _squared_scores(scores_2_Q: Tensor, _batch: Any) -> LossOutput:
    loss = (scores_2_Q[1] - 1.0).square().sum() / 8
    return LossOutput(loss, {"loss": loss.detach()})


def kept(layer: Any) -> list[str]:
    """What a layer's dispatcher still holds of a graph."""
    if not isinstance(layer, ExpertLayer):
        return []
    manager = getattr(layer.token_dispatcher, "_comm_manager", None)
    held = {**vars(layer.token_dispatcher), **({} if manager is None else vars(manager))}
    return [name for name, value in held.items() if isinstance(value, Tensor) and value.requires_grad]


@contextmanager
def twins(calls: Counter[str], add_weight_gradient: Callable[..., None]) -> Iterator[None]:
    """Stand-ins for apex, Transformer Engine's permutation and router, and DeepEP, which count their calls."""

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **keywords)

        return call

    with ExitStack() as stack:

        def stand_in(module: Any, name: str, function: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(module, name, counted(name, function), create=True))

        apex = mock.Mock(wgrad_gemm_accum_fp32=counted("wgrad_gemm_accum_fp32", add_weight_gradient))
        stack.enter_context(mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", apex, create=True))
        stack.enter_context(mock.patch.object(layers, "_grad_accum_fusion_available", True))
        stack.enter_context(mock.patch.object(moe_utils, "HAVE_TE", True))
        for name, function in PERMUTATION.items():
            stand_in(moe_utils, name, function)
        stack.enter_context(mock.patch.object(moe_utils, "fused_permute_and_pad_with_probs", None, create=True))
        for name, function in ROUTER.items():
            stand_in(extensions, name, function)
        stand_in(token_dispatcher, "fused_dispatch", _dispatch)
        stand_in(token_dispatcher, "fused_combine", _combine)
        stack.enter_context(mock.patch.object(token_dispatcher, "set_deepep_num_sms", mock.Mock(), create=True))
        stack.enter_context(indices_on_the_cpu())
        # Megatron compiles a method of the flexible dispatcher.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _add_weight_gradient(inputs: Tensor, grad_outputs: Tensor, total: Tensor) -> None:
    total.add_(grad_outputs.t().matmul(inputs))


def _dispatch(  # as Megatron calls it
    tokens_T_H: Tensor, experts_T_K: Tensor, gates_T_K: Tensor, num_experts: int, group: Any, **_how: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    """DeepEP's: a token goes once to every rank that has one of its experts, with their numbers there, else -1."""
    assert gates_T_K.dtype == torch.float32, "DeepEP takes gates in float32 alone"
    ranks, here = group.size(), num_experts // group.size()
    rows = [((experts_T_K // here) == rank).any(dim=1).nonzero().flatten() for rank in range(ranks)]
    sent = [len(taken) for taken in rows]
    received = torch.empty(ranks, dtype=torch.long)
    dist.all_to_all_single(received, torch.tensor(sent), group=group)
    splits = received.tolist(), sent
    numbers = torch.cat([_numbers(experts_T_K[taken], rank * here, here) for rank, taken in enumerate(rows)])
    places = torch.cat(rows)
    gates = gates_T_K[places].masked_fill(numbers < 0, 0.0)
    carried = all_to_all(group, numbers, *splits)
    counts = torch.bincount(carried[carried >= 0], minlength=here)
    handle = (places, splits, len(tokens_T_H))
    return all_to_all(group, tokens_T_H[places], *splits), carried, all_to_all(group, gates, *splits), counts, handle


def _numbers(experts: Tensor, first: int, here: int) -> Tensor:
    numbers = experts - first
    return numbers.where((numbers >= 0) & (numbers < here), -1)


def _combine(outputs: Tensor, group: Any, handle: Any, **_how: Any) -> tuple[Tensor, None]:
    places, (received, sent), num_tokens = handle
    back = all_to_all(group, outputs, sent, received)
    return back.new_zeros(num_tokens, back.shape[-1]).index_add(0, places, back), None
