"""Kernels of attention beside the definition in float64: which run here, how close they come, and how fast they are.

Shape suffixes: S tokens of a row, H query heads, G key and value heads, D head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.presets import preset
from prism_megatron.engine.layers.attention import SDPACoreAttention, Sequences
from prism_megatron.gpu_check.bench import Bench
from prism_megatron.gpu_check.rows import Row, failed, measured, skipped, within
from prism_megatron.gpu_check.works import PRESET

LIMIT = 4 * 2.0**-8
"""Most that an output or gradient in bf16 may be away from float64's, relative to its norm: a handful of roundings to
8 bits. A token that is seen wrongly is far beyond."""

PARTS = ("output", "gradient of queries", "of keys", "of values")
_NO_KERNEL = ("No available kernel", "No viable backend")
"""What torch says of a kernel that is not for this device or these sizes."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``[1, H, S, D], [1, G, S, D] x 2 -> [1, H, S, D]``."""


@dataclass(frozen=True, eq=False)
class Case:
    """Sequences of a row and what stands before them. ``sees_S_S[i, j]`` is whether token i sees token j."""

    name: str
    sequences: Sequences

    @property
    def length(self) -> int:
        return sum(self.sequences.slots)

    @property
    def prefixes(self) -> Sequence[tuple[int, int]]:
        """First token and length of what stands before each sequence."""
        return self.sequences.prefixes or ((0, 0),) * len(self.sequences.slots)

    def sees(self, device: torch.device) -> Tensor:
        """By the definition: what stands before it in its own sequence, itself, and all of the sequence's prefix."""
        sees_S_S = torch.zeros(self.length, self.length, dtype=torch.bool, device=device)
        start = 0
        for slot, (first, count) in zip(self.sequences.slots, self.prefixes, strict=True):
            rows = slice(start, start + slot)
            sees_S_S[rows, rows] = torch.ones(slot, slot, dtype=torch.bool, device=device).tril()
            sees_S_S[rows, first : first + count] = True
            start += slot
        return sees_S_S


def cases(prompt: int, answer: int) -> list[Case]:
    """One sequence, and four answers that go on from one prompt."""
    shared = Sequences((prompt, *[answer] * 4), ((0, 0), *[(0, prompt)] * 4))
    return [Case("one sequence", Sequences((prompt + 4 * answer,))), Case("4 answers to a prompt", shared)]


def check_attention(bench: Bench) -> Iterator[Row]:
    """Every kernel on short rows against float64, then its time on long ones."""
    short, long = (
        cases(bench.size(256, 32), 64 if not bench.dry else 16),
        cases(bench.size(4096, 64), bench.size(2048, 32)),
    )
    for exact, timed in zip(short, long, strict=True):
        for name, make in kernels(bench, exact).items():
            rows = list(_compared(bench, exact, name, make))
            yield from rows
            if len(rows) == len(PARTS) and all(row.verdict == "holds" for row in rows):
                yield _timed(bench, timed, name, kernels(bench, timed)[name])


def kernels(bench: Bench, case: Case) -> dict[str, Callable[[], Attention]]:
    """What makes each kernel; those that know causal masks alone are for one sequence."""
    made: dict[str, Callable[[], Attention]] = {"ours": lambda: ours(bench, case.sequences)}
    made["flex"] = lambda: flex(bench, case)
    if len(case.sequences.slots) > 1:
        return made
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        made[f"torch {backend.name.lower()}"] = partial(torch_kernel, backend)
    made["flash-attn"] = lambda: flash_attn(bench)
    return made


class MissingError(Exception):
    """A kernel that this machine does not have."""


def ours(bench: Bench, sequences: Sequences) -> Attention:
    """As layers of torch call it (``engine/layers/attention.py``)."""
    config = Qwen3VLProvider(preset(PRESET)).transformer_config(ParallelConfig(), torch.bfloat16)
    core = SDPACoreAttention(
        config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self",
        pg_collection=bench.world.groups,
    )  # fmt: skip

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens_first = [x.permute(2, 0, 1, 3) for x in (query, key, value)]
        context: Tensor = core(*tokens_first, sequences).unflatten(2, (query.shape[1], -1)).permute(1, 2, 0, 3)
        return context

    return run


def torch_kernel(backend: SDPBackend) -> Attention:
    """One of torch's own. Running it raises RuntimeError where it is not for this device."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return run


def flash_attn(bench: Bench) -> Attention:
    """The package of that name. Raises MissingError without it."""
    if bench.machine.flash_attn is None or bench.device.type != "cuda":
        raise MissingError("flash-attn is not installed" if bench.device.type == "cuda" else "flash-attn needs CUDA")
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True)
        return context.transpose(1, 2)

    return run


def flex(bench: Bench, case: Case) -> Attention:
    """torch's flexible attention over the case's mask: compiled on CUDA, as it stands on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slots = torch.tensor(case.sequences.slots)
    prefixes = torch.tensor(case.prefixes)
    of_token = torch.arange(len(slots)).repeat_interleave(slots)
    number_S, first_S, past_S = (
        x.to(bench.device) for x in (of_token, prefixes[of_token, 0], prefixes[of_token].sum(1))
    )

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (number_S[query] == number_S[key]) & (query >= key)
        return own | ((key >= first_S[query]) & (key < past_S[query]))

    mask = create_block_mask(sees, None, None, case.length, case.length, device=str(bench.device))
    kernel: Any = torch.compile(flex_attention) if bench.device.type == "cuda" else flex_attention

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context: Tensor = kernel(query, key, value, block_mask=mask, enable_gqa=True)
        return context

    return run


def definition(sees_S_S: Tensor) -> Attention:
    """Attention as it is defined, in whatever format it is given."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        logits = query @ key.mT * query.shape[-1] ** -0.5
        context: Tensor = logits.masked_fill(~sees_S_S, float("-inf")).softmax(-1) @ value
        return context

    return run


def _compared(bench: Bench, case: Case, name: str, make: Callable[[], Attention]) -> Iterator[Row]:
    what = f"{name}, {case.name}"
    inputs = drawn(bench, case.length)
    gradient = gradient_like(inputs[0])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = passed(definition(case.sees(bench.device)), exact, gradient.double())
    only_forward = name == "flex" and bench.device.type == "cpu"
    try:
        found = [make()(*(x.detach() for x in inputs))] if only_forward else passed(make(), inputs, gradient)
    except MissingError as missing:
        yield skipped(what, str(missing))
        return
    except (RuntimeError, ValueError) as error:  # a line of the table, whatever it is
        reason = str(error).splitlines()[0]
        cannot = name.startswith("torch ") and any(words in str(error) for words in _NO_KERNEL)
        yield skipped(what, reason) if cannot else failed(what, reason)
        return
    for part, mine, one in zip(PARTS, found, expected, strict=False):
        yield within(f"{what}: {part}", float((mine.double() - one).norm() / one.norm()), LIMIT, note="from float64")
    if only_forward:
        yield skipped(f"{what}: gradients", "on the CPU torch has its forward pass alone")


def _timed(bench: Bench, case: Case, name: str, make: Callable[[], Attention]) -> Row:
    inputs, attention = drawn(bench, case.length), make()
    gradient = gradient_like(inputs[0])
    seconds = bench.seconds(lambda: passed(attention, inputs, gradient))
    text = preset(PRESET).text
    pairs = float(case.sees(bench.device).sum())
    flops = 3 * 4 * pairs * text.heads * text.head_dim  # two products of two operations each, thrice with backward
    return measured(
        f"{name}, {case.name}, {case.length} tokens", seconds * 1e3, "ms", f"{flops / seconds / 1e12:.3g} TFLOP/s"
    )


def drawn(bench: Bench, length: int) -> list[Tensor]:
    """Queries, keys and values of the preset's heads in bf16."""
    text = preset(PRESET).text
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, heads, length, text.head_dim, generator=generator)
        .to(bench.device, torch.bfloat16)
        .requires_grad_()
        for heads in (text.heads, text.kv_heads, text.kv_heads)
    ]


def gradient_like(query: Tensor) -> Tensor:
    """Of the output, the same for every kernel."""
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(query.device, query.dtype)


def passed(attention: Attention, inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs for that one of the output."""
    context = attention(*inputs)
    return [context.detach(), *torch.autograd.grad(context, list(inputs), gradient)]
