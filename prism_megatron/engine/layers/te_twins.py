"""What Transformer Engine's kernels around experts compute, by Megatron's plain forms, called as Megatron calls them.

For ``make te-check`` and for tests, which run without CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


def _permute(tokens: Tensor, routing_map: Tensor, *, num_out_tokens: int | None = None) -> Any:
    permuted, _, indices, *_ = moe_utils.permute(tokens, routing_map, num_out_tokens=num_out_tokens)
    return permuted, indices


def _permute_with_probs(
    tokens: Tensor, probs: Tensor, routing_map: Tensor, *, num_out_tokens: int | None = None
) -> Any:
    return moe_utils.permute(tokens, routing_map, probs=probs, num_out_tokens=num_out_tokens)[:3]


def _unpermute(
    permuted: Tensor, indices: Tensor, *, merging_probs: Tensor | None, restore_shape: Any, **_padding: Any
) -> Any:
    return moe_utils.unpermute(permuted, indices, restore_shape, probs=merging_probs)


def _sort_chunks(inputs: Tensor, sizes: Tensor, order: Tensor) -> Any:
    return moe_utils.sort_chunks_by_idxs(inputs, sizes, order)[0]


def _sort_chunks_with_probs(inputs: Tensor, probs: Tensor, sizes: Tensor, order: Tensor) -> Any:
    return moe_utils.sort_chunks_by_idxs(inputs, sizes, order, probs=probs)


PERMUTATION: Mapping[str, Callable[..., Any]] = {
    "fused_permute": _permute,
    "fused_permute_with_probs": _permute_with_probs,
    "fused_unpermute": _unpermute,
    "fused_sort_chunks_by_index": _sort_chunks,
    "fused_sort_chunks_by_index_with_probs": _sort_chunks_with_probs,
}
"""By the names that ``moe_utils`` has for Transformer Engine's functions."""

ROUTER: Mapping[str, Callable[..., Any]] = {
    "fused_topk_with_score_function": moe_utils.topk_routing_with_score_function
}
"""By the name that Megatron's door to Transformer Engine has for it."""


@contextlib.contextmanager
def indices_on_the_cpu() -> Iterator[None]:
    """Megatron's dispatcher makes its indices on the device ``cuda`` where permutation is fused; here it does not."""
    original = MoEAlltoAllTokenDispatcher.__init__

    def init(self: Any, *arguments: Any, config: Any, **keywords: Any) -> None:
        wanted, config.moe_permute_fusion = config.moe_permute_fusion, False
        original(self, *arguments, config=config, **keywords)
        config.moe_permute_fusion = wanted

    with mock.patch.object(MoEAlltoAllTokenDispatcher, "__init__", init):
        yield
