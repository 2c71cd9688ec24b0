"""The CPU door: what Megatron-Core needs to run where there is no CUDA, and no more.

``open_cpu_door()`` is called once per process by ``engine.runtime`` and does nothing where CUDA is present.
``PATCHES`` lists every change with the upstream place it answers, the megatron-core versions it is for, the reason,
and when it can go. They answer calls that would otherwise raise, but for three: ``Tensor.type()`` names CPU tensors as
Megatron's type checks expect them, all-to-all split sizes become plain integers, and a lone rank copies nothing.
Two more give Megatron's linears what only a CUDA extension gives them elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_megatron.engine.host.lone_rank import nothing_alone
from prism_megatron.engine.host.unequal_collectives import gather_unequal, reduce_scatter_unequal
from prism_megatron.engine.host.weight_gradients import WeightGradientsOnCpu


class _Place:
    """Where "the CUDA device" is, for as long as the process lives."""

    device = torch.device("cpu")


@contextlib.contextmanager
def standing_for_cuda(device: torch.device) -> Iterator[None]:
    """Let ``device`` be what Megatron takes for the CUDA device, once the door is open.

    For a process that plays a step on fake tensors (``engine.dry``); everybody else has the CPU.
    """
    before, _Place.device = _Place.device, device
    try:
        yield
    finally:
        _Place.device = before


class _NoStream:
    """Stands in for ``torch.cuda.Stream`` and ``torch.cuda.Event``: work on the CPU is already in order."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def wait_stream(self, _stream: object) -> None:
        pass

    def wait_event(self, _event: object) -> None:
        pass

    def record_event(self, _event: object = None) -> _NoStream:
        return self

    def record(self, _stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


_THE_STREAM = _NoStream()


def _current_device() -> torch.device:
    return _Place.device


def _current_stream(_device: object = None) -> _NoStream:
    return _THE_STREAM


@contextlib.contextmanager
def _stream(_stream: object) -> Iterator[None]:
    yield


def _nothing(*_args: object, **_kwargs: object) -> None:
    return None


def _get_rng_state(*_args: object, **_kwargs: object) -> Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: Tensor, *_args: object, **_kwargs: object) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _tensor_cuda(self: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return self if self.device.type == "meta" else self.to(_Place.device)  # a model that is only counted has no place


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tensor factory that reads ``device="cuda"`` as the CPU, or what stands for CUDA."""

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _Place.device
        return factory(*args, **kwargs)

    return build


def _named_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type()`` that answers 'torch.cuda.FloatTensor' for a CPU float tensor."""

    @functools.wraps(original)
    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if isinstance(answer, str) and answer.startswith("torch.") and not answer.startswith("torch.cuda."):
            return "torch.cuda." + answer.removeprefix("torch.")
        return answer

    return type_


def _move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """As ``moe_utils.maybe_move_tensor_to_cpu``, which converts to numpy only what came from a GPU."""
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@dataclass(frozen=True)
class Patch:
    """One changed name: ``module`` and dotted ``name`` in it; ``new`` makes the replacement from what was there."""

    module: str
    name: str
    new: Callable[[Any], Any]
    upstream: str
    versions: str
    reason: str
    until: str
    may_be_missing: bool = False

    def apply(self) -> None:
        """Replace the name. Raises AttributeError where upstream no longer has it (``until`` has come)."""
        owner: Any = importlib.import_module(self.module)
        *path, leaf = self.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        old = getattr(owner, leaf, None) if self.may_be_missing else getattr(owner, leaf)
        setattr(owner, leaf, self.new(old))


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _old: value


def _or_none(old: Any) -> Any:
    return old


_BOTH = "0.16.1, 0.19.2"
_OWN_DEVICE = "Megatron asks the platform, not torch.cuda, for its device"

PATCHES: tuple[Patch, ...] = (
    Patch(
        module="torch.cuda",
        name="current_device",
        new=_always(_current_device),
        upstream="device=torch.cuda.current_device() in tensor_parallel, distributed, optimizer, p2p, moe/router",
        versions=_BOTH,
        reason="buffers and weights are allocated on 'the current CUDA device'",
        until=_OWN_DEVICE,
    ),
    *(
        Patch(
            module="torch",
            name=factory,
            new=_on_cpu,
            upstream='torch.zeros(…, device="cuda") and kin in schedules, optimizer, clip_grads, exchange_utils',
            versions=_BOTH,
            reason="the device is a literal in the call; wrapping the factories costs less than a TorchFunctionMode",
            until=_OWN_DEVICE,
        )
        for factory in ("zeros", "tensor", "empty", "empty_like")
    ),
    Patch(
        module="torch",
        name="Tensor.cuda",
        new=_always(_tensor_cuda),
        upstream="language_module.py setup_embeddings_and_output_layer: weight.data.cuda(); distrib_optimizer.py",
        versions=_BOTH,
        reason="tied embeddings are zeroed 'on the GPU' on the last stage",
        until=_OWN_DEVICE,
    ),
    Patch(
        module="torch",
        name="Tensor.type",
        new=_named_as_cuda,
        upstream="'torch.cuda.FloatTensor' in clip_grads.py, optimizer.py, distrib_optimizer.py",
        versions=_BOTH,
        reason="parameters and gradients are sorted by the name of their CUDA tensor type",
        until="Megatron compares dtypes",
    ),
    Patch(
        module="torch.cuda",
        name="synchronize",
        new=_always(_nothing),
        upstream="p2p_communication.py after batched sends, dist_checkpointing/strategies/filesystem_async.py",
        versions=_BOTH,
        reason="raises without CUDA; a synchronous dist_checkpointing save calls it",
        until=_OWN_DEVICE,
    ),
    *(
        Patch(
            module="torch.cuda",
            name=name,
            new=_always(answer),
            upstream="moe/token_dispatcher.py side stream; param_and_grad_buffer.py start_grad_sync (0.19.2)",
            versions=_BOTH,
            reason="streams and events raise without CUDA; work on the CPU is already in order",
            until=_OWN_DEVICE,
        )
        for name, answer in (
            ("Stream", _NoStream),
            ("Event", _NoStream),
            ("current_stream", _current_stream),
            ("default_stream", _current_stream),
            ("stream", _stream),
        )
    ),
    *(
        Patch(
            module=module,
            name=name,
            new=_always(answer),
            upstream="tensor_parallel/random.py CudaRNGStatesTracker.add and fork, checkpoint()",
            versions=_BOTH,
            reason="the tracker saves and restores the state of the CUDA generator; here it is the CPU generator's",
            until="the tracker takes a generator",
        )
        for module, name, answer in (
            ("torch.cuda", "get_rng_state", _get_rng_state),
            ("torch.cuda", "set_rng_state", _set_rng_state),
            ("torch.cuda", "manual_seed", _manual_seed),
            ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state),
            ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state),
        )
    ),
    Patch(
        module="megatron.core.transformer.moe.moe_utils",
        name="te_general_gemm",
        new=_or_none,
        upstream="moe_utils.py RouterGatingLinearFunction",
        versions="0.16.1",
        reason="the name is defined only where Transformer Engine is installed, yet read everywhere",
        until="0.16.1 is no longer supported (0.19.2 defines it as None)",
        may_be_missing=True,
    ),
    Patch(
        module="megatron.core.transformer.moe.token_dispatcher",
        name="maybe_move_tensor_to_cpu",
        new=_always(_move_to_host),
        upstream="moe/token_dispatcher.py MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        versions=_BOTH,
        reason="split sizes become numpy only when they come from a GPU; gloo's all_to_all_single wants integers",
        until="maybe_move_tensor_to_cpu honours as_numpy for CPU tensors",
    ),
    *(
        Patch(
            module="megatron.core.tensor_parallel.mappings",
            name=name,
            new=wrapper,
            upstream="moe/token_dispatcher.py: experts split over ranks gather what each of them was sent",
            versions=_BOTH,
            reason="gloo refuses all_gather and reduce_scatter of unequal lengths, which NCCL takes",
            until="gloo takes them",
        )
        for name, wrapper in (
            ("_gather_along_first_dim", gather_unequal),
            ("_reduce_scatter_along_first_dim", reduce_scatter_unequal),
        )
    ),
    *(
        Patch(
            module="megatron.core.tensor_parallel.layers",
            name=name,
            new=_always(answer),
            upstream="tensor_parallel/layers.py LinearWithGradAccumulationAndAsyncCommunication.backward",
            versions=_BOTH,
            reason="what adds a weight's gradient to its sum inside the product is NVIDIA apex's CUDA extension",
            until="Megatron calls torch where the extension is missing",
            may_be_missing=True,
        )
        for name, answer in (
            ("fused_weight_gradient_mlp_cuda", WeightGradientsOnCpu),
            ("_grad_accum_fusion_available", True),
        )
    ),
    *(
        Patch(
            module="megatron.core.distributed.param_and_grad_buffer",
            name=name,
            new=nothing_alone,
            upstream="param_and_grad_buffer.py start_grad_sync and start_param_sync of a distributed optimizer",
            versions=_BOTH,
            reason="with one data-parallel rank gloo copies all gradients and all weights twice, which NCCL does not: "
            "a tenth of a step",
            until="Megatron calls no collective of one rank",
        )
        for name in ("dist_reduce_scatter_func", "dist_all_gather_func")
    ),
)


@functools.cache
def open_cpu_door() -> bool:
    """Apply ``PATCHES`` once where CUDA is absent; says whether it did.

    torch.compile is switched to eager there too: Megatron's ``jit_fuser`` functions would each compile with a C++
    compiler on first use, about half a minute per process.
    """
    if torch.cuda.is_available():
        return False
    with torch.device("cpu"):
        torch.empty(0)  # torch collects the factories that such contexts act on once: it must be the unwrapped ones
    for patch in PATCHES:
        patch.apply()
    torch.compiler.set_stance("force_eager")
    return True
