"""What one layer of Qwen3-VL-2B costs beside the arithmetic it cannot do without, and beside its alternatives.

    make bench-model                      everything, on one thread
    python benchmarks/model.py layer      one part: layer, attention, head or sharded-head

Every comparison runs both sides in one process, in turns, on the same work, and reports the fastest turn in CPU
seconds of one thread: other load on the machine disturbs them less than the wall clock. Memory is the growth of the
resident set of a new process that does the work once. All of it in fp32, and again in bf16 where this CPU multiplies
bf16 matrices faster than fp32 ones: one without such instructions is far slower in it. Not a GPU benchmark: on CUDA
other kernels do this work.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.presets import preset
from prism_megatron.engine.building import data_parallel
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.host.fast_paths import FastPaths
from prism_megatron.engine.layers.attention import SDPACoreAttention, Sequences
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.gpu_check.works import PRESET, bare_arithmetic, head, layer_flops, one_layer, spread
from prism_megatron.testing import GlooWorld

Work = Callable[[], Any]
Works = Callable[..., Mapping[str, Work]]
"""Builds named works for a world: ``works(world, *arguments)``."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = 2048
OVERHEAD_LIMIT = 1.1
"""Most that a layer may take, as a multiple of its bare matrix products and attention."""
GAIN = 1.05
"""Least times that a layer is as fast as transformers'."""
HEAD_TIME_LIMIT, HEAD_MEMORY_LIMIT = 1.15, 5
"""Most that the chunked output layer may take of the plain one's time, and least by how much it needs less memory."""
HEAD_SPREAD_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest difference of a loss or gradient to the plain one, relative to its norm: what the formats resolve."""
TURNS = 7


def fastest(works: Mapping[str, Work], turns: int = TURNS) -> dict[str, float]:
    """CPU seconds of each work's fastest of several turns, taken alternately after a turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns + 1):
        for name, work in works.items():
            begin = time.process_time()
            work()
            times[name].append(time.process_time() - begin)
    return {name: min(taken[1:]) for name, taken in times.items()}


def peak_bytes(works: Works, arguments: tuple[Any, ...], name: str) -> int:
    """Growth of the resident set while ``works(world, *arguments)[name]`` runs once, in a process of its own."""
    context = mp.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(works, arguments, name, sending))
    child.start()
    grown: int = receiving.recv()
    child.join()
    return grown


def _measure(works: Works, arguments: tuple[Any, ...], name: str, sending: Connection) -> None:
    torch.set_num_threads(1)
    work = works(start(ParallelConfig(), seed=1), *arguments)[name]
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now
    before = _status("VmRSS")
    work()
    sending.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes, from Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; the benchmark needs Linux")


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product, forward only."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / fastest({"": lambda: left @ right}, turns=2)[""]


def formats_here() -> tuple[torch.dtype, ...]:
    """fp32, and bf16 where the CPU has instructions for it: where its matrix products are the faster ones."""
    rates = {dtype: matmul_rate(dtype, size=256) for dtype in DTYPES.values()}
    print("square matmul at 256: " + ", ".join(f"{dtype} {rate / 1e9:.1f} GFLOP/s" for dtype, rate in rates.items()))
    return tuple(DTYPES.values()) if rates[torch.bfloat16] > rates[torch.float32] else (torch.float32,)


def transformers_layer(dtype: torch.dtype) -> nn.Module:
    """transformers' decoder layer of the same sizes, with its sdpa attention."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

    text = preset(PRESET).text
    config = Qwen3VLTextConfig(
        hidden_size=text.hidden,
        intermediate_size=text.ffn,
        num_attention_heads=text.heads,
        num_key_value_heads=text.kv_heads,
        head_dim=text.head_dim,
        rms_norm_eps=text.eps,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    layer: nn.Module = Qwen3VLTextDecoderLayer(config, layer_idx=0).to(dtype)
    return layer


def bench_layer(world: World, dtype: torch.dtype) -> bool:
    """One layer's micro-batch, whose gradients are added to those before it: ours, and transformers' with torch's
    ``.grad``; and the bare arithmetic, which keeps none.
    """
    fast = FastPaths(fuse_weight_gradients=True)  # as a run's --fuse-weight-gradients auto
    ours, theirs = one_layer(world, dtype, tokens=TOKENS, execution=Execution(fast=fast)), transformers_layer(dtype)
    holds_gradients = data_parallel(ours.module, ours.module.config, world, distributed=False, fast=fast)
    angles = (ours.cos_L_1_1_D.squeeze(2).transpose(0, 1), ours.sin_L_1_1_D.squeeze(2).transpose(0, 1))
    hidden = ours.hidden_L_1_H.detach().transpose(0, 1).requires_grad_()
    gradient = ours.gradient_L_1_H.transpose(0, 1)

    def train_ours() -> None:
        ours.hidden_L_1_H.grad = None
        ours.forward().backward(ours.gradient_L_1_H)

    def train_theirs() -> None:
        hidden.grad = None
        theirs(hidden, position_embeddings=angles, attention_mask=None).backward(gradient)

    times = fastest(
        {
            "bare arithmetic": bare_arithmetic(dtype, tokens=TOKENS, device=world.device),
            "ours": train_ours,
            "transformers": train_theirs,
        }
    )
    flops = layer_flops(TOKENS)
    rate = matmul_rate(dtype, size=2048)
    print(
        f"\none {PRESET} layer, {TOKENS} tokens, {dtype}, forward and backward ({flops / 1e9:.0f} model GFLOP, causal)"
    )
    for name, seconds in times.items():
        print(
            f"  {name:16} {seconds:8.3f} s   {seconds / times['bare arithmetic']:5.2f} of the bare arithmetic   "
            f"{flops / seconds / rate:6.1%} of the square matmul's {rate / 1e9:.0f} GFLOP/s"
        )
    within = times["ours"] <= OVERHEAD_LIMIT * times["bare arithmetic"]
    gain = times["transformers"] / times["ours"]
    summed = next(parameter.main_grad for parameter in holds_gradients.parameters() if parameter.dim() == 2)
    print(
        f"  within {OVERHEAD_LIMIT} of the bare arithmetic: {_yes(within)}; "
        f"{gain:.3f} times as fast as transformers (asked {GAIN}): {_yes(gain >= GAIN)}"
    )
    return within and gain >= GAIN and bool(summed.any())


def attention_works(world: World, dtype: torch.dtype, tokens: int) -> dict[str, Work]:
    """Our core attention and Megatron's local one, forward and backward, on the same inputs."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    text = preset(PRESET).text
    settings: dict[str, Any] = {
        "config": Qwen3VLProvider(preset(PRESET)).transformer_config(ParallelConfig(), dtype),
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "pg_collection": world.groups,
    }
    ours, local = SDPACoreAttention(**settings), DotProductAttention(**settings)
    query = torch.randn(tokens, 1, text.heads, text.head_dim).to(dtype).requires_grad_()
    key, value = (torch.randn(tokens, 1, text.kv_heads, text.head_dim).to(dtype).requires_grad_() for _ in "kv")
    gradient = torch.randn(tokens, 1, text.heads * text.head_dim).to(dtype)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu(1)
    inputs = (query, key, value)

    def run_ours() -> None:
        torch.autograd.grad(ours(*inputs, Sequences((tokens,))), inputs, gradient)

    def run_local() -> None:
        torch.autograd.grad(local(*inputs, mask, attn_mask_type=AttnMaskType.causal), inputs, gradient)

    return {"ours": run_ours, "Megatron's local": run_local}


def bench_attention(world: World, dtype: torch.dtype) -> bool:
    """The core attention against Megatron's local one."""
    text = preset(PRESET).text
    print(f"\ncore attention, {text.heads} heads, {text.kv_heads} kv heads of {text.head_dim}, forward and backward")
    better = True
    for tokens in (1024, 2048, 4096):
        better &= _compare(f"{tokens} tokens", attention_works, world, (dtype, tokens))
    return better


def head_works(world: World, dtype: torch.dtype, tokens: int) -> dict[str, Work]:
    """The output layer's two ways."""
    made = head(world, dtype, tokens=tokens)
    return {"chunked": made.chunked, "plain": made.plain}


def bench_head(world: World, dtype: torch.dtype) -> bool:
    """The output layer in chunks against the plain computation: the same numbers, time and memory."""
    tokens, vocab = 2 * TOKENS, preset(PRESET).text.vocab
    print(f"\noutput layer, log-probs and entropy of {tokens} tokens over {vocab} columns in {dtype}, with gradients")
    made = head_works(world, dtype, tokens)
    apart = spread(made["chunked"](), made["plain"]())
    print(f"  loss and gradients apart by at most {apart:.1e} of their norms")
    times = fastest(made, turns=2)
    memory = {name: peak_bytes(head_works, (dtype, tokens), name) for name in made}
    for name, seconds in times.items():
        print(f"  {name:12} {seconds:8.2f} s   {memory[name] / 2**20:8.0f} MiB", flush=True)
    slower, smaller = times["chunked"] / times["plain"], memory["plain"] / memory["chunked"]
    print(f"  chunked takes {slower:.2f} of the time (limit {HEAD_TIME_LIMIT}) and 1/{smaller:.1f} of the memory "
          f"(limit 1/{HEAD_MEMORY_LIMIT})")  # fmt: skip
    return slower <= HEAD_TIME_LIMIT and smaller >= HEAD_MEMORY_LIMIT and apart <= HEAD_SPREAD_LIMIT[dtype]


def bench_sharded_head(world: World, dtype: torch.dtype) -> bool:
    """The output layer in chunks with the vocabulary on two and on four ranks, against the plain computation of one."""
    tokens, vocab = 2 * TOKENS, preset(PRESET).text.vocab
    print(f"\noutput layer of {tokens} tokens over {vocab} columns in {dtype}, shared among ranks")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.safetensors"
        loss, hidden_grad, weight_grad = head_works(world, dtype, tokens)["plain"]()
        plain_norms = [float(one.float().norm()) for one in (loss, hidden_grad, weight_grad)]
        save_file({"weight": weight_grad, "loss": loss}, path)
        del weight_grad
        with GlooWorld(4, timeout_s=1800.0) as gloo:
            for tp in (2, 4):
                parts = gloo.run(_head_share, dtype, tokens, str(path), num_ranks=tp, parallel=ParallelConfig(tp=tp))
                apart = [
                    float((sum(part["hidden"].float() for part in parts) - hidden_grad.float()).norm()),
                    sum(part["weight"] ** 2 for part in parts) ** 0.5,
                    max(part["loss"] for part in parts),
                ]
                norms = (plain_norms[1], plain_norms[2], plain_norms[0])
                furthest = max(one / norm for one, norm in zip(apart, norms, strict=True))
                grown = max(part["bytes"] for part in parts) / 2**20
                print(f"  TP{tp}: loss and gradients apart by at most {furthest:.1e} of their norms; "
                      f"{grown:.0f} MiB on the rank that holds most", flush=True)  # fmt: skip
                good &= furthest <= HEAD_SPREAD_LIMIT[dtype]
    return good


def _head_share(world: World, dtype: torch.dtype, tokens: int, path: str) -> dict[str, Any]:
    """One rank's part: its hidden gradient, and how far its loss and weight gradient are from the plain ones."""
    torch.set_num_threads(1)
    work = head_works(world, dtype, tokens)["chunked"]
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    loss, hidden_grad, weight_grad = work()
    grown = _status("VmHWM") - before
    with safe_open(path, framework="pt") as plain:
        rows = plain.get_slice("weight")
        share = rows.get_shape()[0] // world.parallel.tp
        wanted = rows[world.tp_rank * share : (world.tp_rank + 1) * share]
        apart = float((weight_grad.float() - wanted.float()).norm())
        return {"hidden": hidden_grad, "weight": apart, "bytes": grown,
                "loss": abs(float(loss - plain.get_tensor("loss")))}  # fmt: skip


def _compare(label: str, works: Works, world: World, arguments: tuple[Any, ...]) -> bool:
    """Print time and memory of two works; whether the first takes no more of either."""
    made = works(world, *arguments)
    times = fastest(made, turns=3)
    memory = {name: peak_bytes(works, arguments, name) for name in made}
    for name, seconds in times.items():
        print(f"  {label:12} {name:18} {seconds:8.3f} s   {memory[name] / 2**20:8.0f} MiB", flush=True)
    first, second = made
    return times[first] <= times[second] and memory[first] <= memory[second]


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


BENCHMARKS = {
    "layer": bench_layer,
    "attention": bench_attention,
    "head": bench_head,
    "sharded-head": bench_sharded_head,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(BENCHMARKS), metavar="PART", help=", ".join(BENCHMARKS))
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtypes = formats_here() if arguments.dtype == "auto" else (DTYPES[arguments.dtype],)
    world = start(ParallelConfig(), seed=1)
    results = {f"{part}, {dtype}": BENCHMARKS[part](world, dtype) for dtype in dtypes for part in arguments.parts}
    stop(world)
    print("\n" + "\n".join(f"{name}: {'holds' if result else 'DOES NOT HOLD'}" for name, result in results.items()))
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
