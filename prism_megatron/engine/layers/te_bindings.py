"""Stand-ins for Transformer Engine's modules that bind what they are given to the real signatures.

The modules cannot be made without CUDA. Here their constructors and forward passes bind every argument and then give
back tensors of the right shape; recipes are the real classes. For ``make te-check``; needs Transformer Engine.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from torch import Tensor, nn

from prism_megatron.engine.layers.attention import Sequences
from prism_megatron.engine.layers.te import TECoreAttention
from prism_megatron.engine.layers.te_twins import PERMUTATION, ROUTER, indices_on_the_cpu


@dataclass
class Ledger:
    """Every callable of Transformer Engine that was called, the keywords it was given, and the recipes it fitted."""

    column: str = ""
    keywords: dict[str, set[str]] = field(default_factory=dict)
    fitted: dict[str, set[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def bind(self, name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """The arguments by name, with defaults. Raises TypeError where they do not fit."""
        try:
            bound = inspect.signature(function).bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
        self.keywords.setdefault(name, set()).update(keywords)
        self.fitted.setdefault(name, set()).add(self.column)
        bound.apply_defaults()
        return dict(bound.arguments)


@contextlib.contextmanager
def stand_ins(ledger: Ledger) -> Iterator[None]:
    """Transformer Engine's modules, Adam and FP8 context, with bodies that only bind and shape."""
    with contextlib.ExitStack() as stack:
        for owner, make, run in (
            (te.Linear, _make_linear, _run_linear),
            (te.GroupedLinear, _make_grouped, _run_grouped),
            (te.RMSNorm, _make_norm, _run_norm),
            (te.DotProductAttention, _make_nothing, _run_attention),
            (te.Fp8Padding, _make_nothing, lambda _self, bound: (bound["inp"], bound["m_splits"])),
            (te.Fp8Unpadding, _make_nothing, lambda _self, bound: bound["inp"]),
            (te.optimizers.FusedAdam, _make_adam, None),
        ):
            stack.enter_context(mock.patch.object(owner, "__init__", _bound_init(ledger, owner, make)))
            if run is not None:
                stack.enter_context(mock.patch.object(owner, "_apply", nn.Module._apply))  # the real one wants CUDA
                stack.enter_context(mock.patch.object(owner, "forward", _bound_forward(ledger, owner, run)))
        for module, twins in ((moe_utils, PERMUTATION), (extensions, ROUTER)):
            for name, twin in twins.items():
                bound = _bound_function(ledger, name, getattr(module, name), twin)
                stack.enter_context(mock.patch.object(module, name, bound))
        stack.enter_context(indices_on_the_cpu())
        stack.enter_context(mock.patch.object(te, "fp8_autocast", _bound_autocast(ledger, te.fp8_autocast)))
        stack.enter_context(mock.patch.object(te, "checkpoint", _bound_checkpoint(ledger, te.checkpoint)))
        yield


def _bound_function(
    ledger: Ledger, name: str, original: Callable[..., Any], twin: Callable[..., Any]
) -> Callable[..., Any]:
    def function(*arguments: Any, **keywords: Any) -> Any:
        ledger.bind(name, original, *arguments, **keywords)
        return twin(*arguments, **keywords)

    return function


def _bound_init(ledger: Ledger, owner: Any, make: Callable[[Any, dict[str, Any]], None]) -> Callable[..., None]:
    original = owner.__init__

    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        bound = ledger.bind(owner.__name__, original, self, *arguments, **keywords)
        if isinstance(self, nn.Module):
            nn.Module.__init__(self)
        make(self, bound)

    return init


def _bound_forward(ledger: Ledger, owner: Any, run: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    original = owner.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return run(self, ledger.bind(f"{owner.__name__}.forward", original, self, *arguments, **keywords))

    return forward


def _bound_autocast(ledger: Ledger, original: Callable[..., Any]) -> Callable[..., Any]:
    def fp8_autocast(**keywords: Any) -> Any:
        bound = ledger.bind("fp8_autocast", original, **keywords)
        recipe = type(bound["fp8_recipe"])
        ledger.bind(recipe.__name__, lambda: None)  # Megatron has made the real one: it takes what it was given
        return contextlib.nullcontext()

    return fp8_autocast


def _bound_checkpoint(ledger: Ledger, original: Callable[..., Any]) -> Callable[..., Any]:
    taken = inspect.getsource(original)

    def checkpoint(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        ledger.bind("checkpoint", original, function, *arguments, **keywords)
        for name in keywords:  # its signature takes any keyword, and hands on to the function what it does not know
            if f'kwargs.pop("{name}"' not in taken:
                raise TypeError(f"checkpoint() does not take {name!r}")
        return function(*arguments)

    return checkpoint


def _make_nothing(_self: Any, _bound: dict[str, Any]) -> None:
    pass


def _make_linear(self: Any, bound: dict[str, Any]) -> None:
    self.save_original_input = bound["save_original_input"]  # megatron-core looks for it
    self.weight = _weight(bound, bound["out_features"], bound["in_features"])


def _run_linear(self: Any, bound: dict[str, Any]) -> Tensor:
    return nn.functional.linear(bound["inp"], self.weight)


def _make_grouped(self: Any, bound: dict[str, Any]) -> None:
    self.num_gemms = bound["num_gemms"]
    for gemm in range(self.num_gemms):
        self.register_parameter(f"weight{gemm}", _weight(bound, bound["out_features"], bound["in_features"]))


def _run_grouped(self: Any, bound: dict[str, Any]) -> Tensor:
    parts = bound["inp"].split(bound["m_splits"])
    weights = [getattr(self, f"weight{gemm}") for gemm in range(self.num_gemms)]
    return torch.cat([nn.functional.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])


def _make_norm(self: Any, bound: dict[str, Any]) -> None:
    keywords = bound | bound.get("kwargs", {})
    self.weight = _weight(keywords, keywords["normalized_shape"] or keywords["hidden_size"])
    self.weight.sequence_parallel = keywords["sequence_parallel"]


def _run_norm(self: Any, bound: dict[str, Any]) -> Tensor:
    x: Tensor = bound["input"]
    return nn.functional.rms_norm(x, self.weight.shape, self.weight)


def _run_attention(_self: Any, bound: dict[str, Any]) -> Tensor:
    query, key, value = (bound[f"{name}_layer"] for name in ("query", "key", "value"))
    context: Tensor = query.flatten(-2) + 0 * (key.sum() + value.sum())
    return context


def _make_adam(self: Any, bound: dict[str, Any]) -> None:
    torch.optim.Optimizer.__init__(self, bound["params"], {"lr": bound["lr"]})


def _weight(bound: dict[str, Any], *size: int) -> nn.Parameter:
    return nn.Parameter(torch.full(size, 0.01, dtype=bound["params_dtype"], device=bound["device"]))


def call_context_parallel_attention(config: TransformerConfig, groups: ProcessGroupCollection) -> None:
    """Attention as ``config.cp_comm_type`` has it, padded and packed, on a group of one rank that says it is more."""
    core = TECoreAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=config.cp_comm_type,
        pg_collection=groups,
    )
    for slots in ((64,), (32, 32)):
        query = torch.zeros(32, 1, config.num_attention_heads, config.kv_channels)
        key = query[:, :, : config.num_query_groups]
        core(query, key, key, Sequences(slots))
