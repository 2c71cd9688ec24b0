"""What torch and Megatron need to be told for a step to run on fake tensors, in a world of which one rank is there.

``ANSWERS`` lists every change with its reason, as the CPU door's table does (``engine.host.cpu``), which is open
beneath it. They hold for a process that does nothing else. What is computed stays the code of a real run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from prism_megatron.engine.host.cpu import Patch, standing_for_cuda

_BOTH = "0.16.1, 0.19.2"
_FAKES = "torch's fake tensors have values"


def _moved(self: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
    """``Module.to`` that puts new parameters in place of fake ones, whose data cannot be exchanged."""
    for module in self.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            data = parameter.detach().to(*arguments, **keywords)
            if (data.device, data.dtype) != (parameter.device, parameter.dtype):
                new = nn.Parameter(data, requires_grad=parameter.requires_grad)
                new.__dict__.update(parameter.__dict__)
                module._parameters[name] = new
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = None if buffer is None else buffer.to(*arguments, **keywords)
    return self


def _plain_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type()`` without the name of the device that stands for CUDA."""

    def type_(self: Tensor, *arguments: Any, **keywords: Any) -> Any:
        answer = original(self, *arguments, **keywords)
        return answer.replace("lazy.", "") if isinstance(answer, str) else answer

    return type_


def _gather_objects(gathered: list[Any], value: Any, group: Any = None) -> None:
    del group
    gathered[:] = [value] * len(gathered)


def _broadcast_objects(_objects: list[Any], *_arguments: Any, **_keywords: Any) -> None:
    """The box keeps what this rank put in."""


@contextlib.contextmanager
def _nothing_random(*_arguments: Any, **_keywords: Any) -> Any:
    yield


@contextlib.contextmanager
def _one_by_one(*_arguments: Any, **_keywords: Any) -> Any:
    yield None


def _itself(group: Any) -> Any:
    """The group that is asked for."""
    return group


def _none(*_arguments: Any, **_keywords: Any) -> None:
    """Nothing is made."""


def _no_requests(_operations: Sequence[Any]) -> list[Any]:
    return []


def _cpu_type(*_arguments: Any) -> str:
    return "cpu"


def _some_norm(_chunk_size: int, _overflow: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *_: Any) -> Any:
    return tensor_lists[0][0].new_ones(1, dtype=torch.float32), None


def _flash_attention(  # noqa: PLR0917  # torch's own signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The flash kernel, whose bytes a GPU's has too: output and a log-normaliser a query are kept, no score matrix."""
    del attn_mask, enable_gqa
    attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return attended


class _MaskedSelect(torch.autograd.Function):
    """``masked_select`` whose number of rows is known: it keeps what torch's keeps."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(values, mask)
        return values.new_empty(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        values, mask = ctx.saved_tensors
        return torch.zeros_like(values).masked_scatter(mask, grad), None, None


def _permute(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's permutation of tokens, whose selections have as many rows as tokens have choices."""

    def permute(*arguments: Any, num_out_tokens: int, **keywords: Any) -> Any:
        def select(values: Tensor, mask: Tensor) -> Tensor:
            chosen: Tensor = _MaskedSelect.apply(values, mask, num_out_tokens)  # type: ignore[no-untyped-call]
            return chosen

        before = Tensor.masked_select
        Tensor.masked_select = select  # type: ignore[method-assign, assignment]
        try:
            return original(*arguments, num_out_tokens=num_out_tokens, **keywords)
        finally:
            Tensor.masked_select = before  # type: ignore[method-assign]

    return permute


def balanced_map(num_tokens: int, num_experts: int, per_token: int) -> Tensor:
    """``[T, E]``: every token chooses the experts that are next in turn, so that all of them have equally many."""
    tokens = torch.arange(num_tokens).unsqueeze(-1)
    chosen = (tokens * per_token + torch.arange(per_token)) % num_experts
    return torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, chosen, value=True)


def _preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's counts of tokens for each rank and expert, of a balanced routing."""

    def preprocess(self: Any, routing_map: Tensor) -> Any:
        with _disable_current_modes(), standing_for_cuda(torch.device("cpu")):
            num_tokens, num_experts = routing_map.shape
            real = balanced_map(num_tokens, num_experts, self.config.moe_router_topk)
            tokens_per_expert = original(self, real).numpy().copy()
            for name in ("input_splits", "output_splits", "output_splits_tp", "num_global_tokens_per_local_expert"):
                counts = getattr(self, name, None)
                if isinstance(counts, Tensor):
                    setattr(self, name, counts.numpy().copy())
        return tokens_per_expert

    return preprocess


def _gather_counts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of real counts, those of every rank: the same, for all of them route alike. Fakes are gathered as ever."""

    def gather(given: Tensor, *arguments: Any, group: Any, **keywords: Any) -> Any:
        if isinstance(given, FakeTensor):
            return original(given, *arguments, group=group, **keywords)
        return given.repeat(group.size())

    return gather


def _on_host(original: Callable[..., Any]) -> Callable[..., Any]:
    def made(*arguments: Any, **keywords: Any) -> Any:
        with _disable_current_modes():
            return original(*arguments, **keywords)

    return made


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _old: value


_ONE_RANK = "the other ranks are there"

ANSWERS: tuple[Patch, ...] = (
    Patch(
        module="torch.nn",
        name="Module.to",
        new=_always(_moved),
        upstream="torch.nn.Module._apply swaps the contents of two tensors, of which nobody may hold a weak reference",
        versions=_BOTH,
        reason="fake tensors are held weakly by their mode",
        until="torch moves fake parameters",
    ),
    Patch(
        module="torch",
        name="Tensor.type",
        new=_plain_type,
        upstream="'torch.cuda.FloatTensor' in clip_grads.py, optimizer.py, distrib_optimizer.py",
        versions=_BOTH,
        reason="a tensor of the device that stands for CUDA says so in its type's name",
        until="Megatron compares dtypes",
    ),
    *(
        Patch(
            module="torch.distributed",
            name=name,
            new=_always(answer),
            upstream="optimizer/__init__.py gathers names of parameter groups; prism_megatron.parallel.collectives",
            versions=_BOTH,
            reason="objects travel pickled in tensors, and fakes have no values; all ranks say what this one says",
            until=_ONE_RANK,
        )
        for name, answer in (("all_gather_object", _gather_objects), ("broadcast_object_list", _broadcast_objects))
    ),
    Patch(
        module="prism_megatron.parallel.collectives",
        name="object_group",
        new=_always(_itself),
        upstream="prism_megatron.parallel.object_groups, whose groups are gloo's",
        versions=_BOTH,
        reason="no other rank is there to make them with, and nothing travels",
        until=_ONE_RANK,
    ),
    Patch(
        module="prism_megatron.engine.engine",
        name="WeightTable",
        new=_always(_none),
        upstream="engine.py names the weights of all stages together",
        versions=_BOTH,
        reason="it asks the other stages for theirs; nothing is loaded or exported here",
        until=_ONE_RANK,
    ),
    Patch(
        module="torch.distributed",
        name="batch_isend_irecv",
        new=_always(_no_requests),
        upstream="p2p_communication.py sends payloads between stages",
        versions=_BOTH,
        reason="the fake process group has no neighbours; what is received stays empty",
        until=_ONE_RANK,
    ),
    Patch(
        module="megatron.core.distributed.param_and_grad_buffer",
        name="_coalescing_manager",
        new=_always(_one_by_one),
        upstream="param_and_grad_buffer.py reduces several buckets as one",
        versions=_BOTH,
        reason="the fake process group cannot coalesce",
        until="it can",
    ),
    Patch(
        module="megatron.core.tensor_parallel.random",
        name="CudaRNGStatesTracker.fork",
        new=_always(_nothing_random),
        upstream="random.py CudaRNGStatesTracker.fork compares states of the host's generator",
        versions=_BOTH,
        reason="the comparison has no value, and nothing random happens in between: dropout is 0 everywhere",
        until=_FAKES,
    ),
    Patch(
        module="megatron.core.optimizer.clip_grads",
        name="l2_norm_impl",
        new=_always(_some_norm),
        upstream="utils.py local_multi_tensor_l2_norm, which stands for Transformer Engine's or apex's",
        versions=_BOTH,
        reason="it makes a tensor of a list of tensors, whose values it reads",
        until=_FAKES,
    ),
    Patch(
        module="torch.utils.checkpoint",
        name="_infer_device_type",
        new=_always(_cpu_type),
        upstream="checkpoint.py looks for torch's module of the device's name, for generators and autocast",
        versions=_BOTH,
        reason="the device that stands for CUDA has none, and neither is used",
        until="torch has such a module",
    ),
    Patch(
        module="torch.nn.functional",
        name="scaled_dot_product_attention",
        new=_always(_flash_attention),
        upstream="prism_megatron.engine.layers.sdpa, torch.nn.attention.bias",
        versions=_BOTH,
        reason="torch chooses its slow kernel with a matrix of scores for a device that it does not know",
        until="the flash kernel is chosen for it",
    ),
    Patch(
        module="prism_megatron.engine.layers.attention",
        name="causal_lower_right",
        new=_always(_none),
        upstream="torch.nn.attention.bias.CausalBias",
        versions=_BOTH,
        reason="it makes a tensor of a class of its own, which cannot be a fake; the flash kernel needs no mask",
        until="torch makes fake ones",
    ),
    Patch(
        module="megatron.core.transformer.moe.token_dispatcher",
        name="MoEAlltoAllTokenDispatcher.__init__",
        new=_on_host,
        upstream="token_dispatcher.py keeps orders of chunks in host memory and reads them",
        versions=_BOTH,
        reason="they have to have values",
        until=_FAKES,
    ),
    Patch(
        module="megatron.core.transformer.moe.token_dispatcher",
        name="MoEAlltoAllTokenDispatcher.preprocess",
        new=_preprocess,
        upstream="token_dispatcher.py counts the tokens of each expert and brings the counts to the host",
        versions=_BOTH,
        reason="the choice of experts has no value; a balanced one is counted by the same code",
        until=_FAKES,
    ),
    Patch(
        module="megatron.core.transformer.moe.token_dispatcher",
        name="gather_from_sequence_parallel_region",
        new=_gather_counts,
        upstream="token_dispatcher.py preprocess gathers the counts of all ranks",
        versions=_BOTH,
        reason="the fake process group does not fill what it gathers",
        until=_ONE_RANK,
    ),
    Patch(
        module="megatron.core.transformer.moe.token_dispatcher",
        name="permute",
        new=_permute,
        upstream="moe_utils.py permute selects tokens by a mask",
        versions=_BOTH,
        reason="the number of rows has no value, but is known: every token has as many as it chooses experts",
        until=_FAKES,
    ),
)

KNOWN_WAITS: Mapping[tuple[str, str], str] = {
    (
        "megatron.core.transformer.moe.token_dispatcher",
        "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
    ): "an all-to-all takes its split sizes from the host; once an expert layer, on a stream of its own",
    (
        "megatron.core.transformer.moe.moe_utils",
        "permute",
    ): "a selection by a mask has to know its length; twice an expert layer, until the permutation is fused",
    (
        "megatron.core.pipeline_parallel.p2p_communication",
        "P2PCommunicator._communicate_shapes",
    ): "payloads grow and shrink with images, so stages tell each other their shapes; once a payload",
    (
        "prism_megatron.engine.vision.cache",
        "VisionCache.recall",
    ): "ranks agree which images a cache on disk has; with --cache-vision alone, which is not played",
}
"""Where the host waits for the device inside a pass, by module and name, and why; the answers above stand in for
Megatron's. Anything else that waits raises."""
