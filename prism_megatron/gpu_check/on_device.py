"""The checks that need no process beside their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prism_megatron.gpu_check.attention import check_attention
from prism_megatron.gpu_check.bench import Bench, bench
from prism_megatron.gpu_check.experts import check_experts
from prism_megatron.gpu_check.head import check_head
from prism_megatron.gpu_check.layer import check_layer
from prism_megatron.gpu_check.memory import check_memory
from prism_megatron.gpu_check.parity import check_parity
from prism_megatron.gpu_check.rows import Row

_CHECKS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    "parity": check_parity,
    "attention": check_attention,
    "layer": check_layer,
    "experts": check_experts,
    "head": check_head,
    "memory": check_memory,
}


def on_device(check: str, *, dry: bool) -> Iterator[Row]:
    """Rows of the check of that name, in a world of this process."""
    with bench(dry=dry) as made:
        yield from _CHECKS[check](made)
