"""The output layer in chunks beside all logits at once: the same numbers, time and memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prism_megatron.gpu_check.bench import Bench
from prism_megatron.gpu_check.rows import Row, measured, skipped, within
from prism_megatron.gpu_check.works import PRESET, head, spread

APART = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Most that loss and gradients may lie apart, relative to their norms: what the formats resolve, as on the CPU."""


def check_head(bench: Bench) -> Iterator[Row]:
    """In fp32 and bf16, at the published vocabulary."""
    tokens = bench.size(4096, 16)
    for dtype, limit in APART.items():
        name = f"{PRESET} output layer, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
        made = head(bench.world, dtype, tokens=tokens)
        yield within(f"{name}: chunked and plain apart", spread(made.chunked(), made.plain()), limit)
        chunked, plain = bench.seconds(made.chunked), bench.seconds(made.plain)
        yield measured(f"{name}: chunked", chunked * 1e3, "ms", f"{chunked / plain:.2f} of the plain one's time")
        chunked_bytes, plain_bytes = bench.peak_bytes(made.chunked), bench.peak_bytes(made.plain)
        if chunked_bytes is None or plain_bytes is None:
            yield skipped(f"{name}: memory", "the CPU keeps no account of tensors")
        else:
            share = chunked_bytes / plain_bytes
            yield within(
                f"{name}: chunked memory of the plain one's", share, 1.0, note=f"{chunked_bytes / 2**20:.0f} MiB"
            )
