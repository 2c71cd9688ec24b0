"""What one layer costs beside its matrix products, and those beside a square one's rate: the roof."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.engine.host.capabilities import MINIMUM_CAPABILITY
from prism_megatron.engine.host.execution import PLAIN, Execution
from prism_megatron.gpu_check.bench import Bench
from prism_megatron.gpu_check.rows import Row, measured, skipped
from prism_megatron.gpu_check.works import PRESET, bare_arithmetic, layer_flops, matrix_products, one_layer

KERNELS = 8
"""How many of a layer's kernels are named, those that take longest."""


def check_layer(bench: Bench) -> Iterator[Row]:
    """Times and shares of the roof; nothing is asked of them, since no such device has been measured yet."""
    tokens, dtype = bench.size(8192, 16), torch.bfloat16
    side = bench.size(8192, 256)
    left, right = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    roof = 2 * side**3 / bench.seconds(lambda: left @ right)
    yield measured(f"square bf16 matmul at {side}: the roof", roof / 1e12, "TFLOP/s")
    flops = layer_flops(tokens)
    products = bench.seconds(matrix_products(dtype, tokens=tokens, device=bench.device))
    yield measured(f"{PRESET} layer's matrix products, {tokens} tokens", products * 1e3, "ms")
    bare = bench.seconds(bare_arithmetic(dtype, tokens=tokens, device=bench.device))
    yield measured("the same and its attention kernel", bare * 1e3, "ms", _share(flops, bare, roof))
    for name, execution, why_not in executions(bench):
        if why_not:
            yield skipped(f"{PRESET} layer, {name}", why_not)
            continue
        layer = one_layer(bench.world, dtype, tokens=tokens, execution=execution)
        seconds = bench.seconds(layer.train)
        note = f"{_share(flops, seconds, roof)}; {seconds / bare:.2f} of its bare arithmetic"
        yield measured(f"{PRESET} layer, {name}, forward and backward", seconds * 1e3, "ms", note)
        yield from _kernels(bench, name, layer.train)


def executions(bench: Bench) -> list[tuple[str, Execution, str]]:
    """Name, settings and, where it cannot run here, why not: layers of torch, of Transformer Engine, and its FP8."""
    capability = bench.machine.compute_capability
    missing = "" if bench.machine.transformer_engine else "Transformer Engine is not installed"
    if capability is None:
        missing = missing or "Transformer Engine runs on CUDA alone"
    made = [("torch", PLAIN, ""), ("Transformer Engine", Execution(layers="te"), missing)]
    for recipe, least in MINIMUM_CAPABILITY.items():
        precision = PrecisionConfig(transformer_engine="on", fp8="hybrid", fp8_recipe=recipe)
        older = capability is not None and capability < least
        needs = f"needs compute capability {least[0]}.{least[1]}" if older else ""
        made.append((f"FP8 {recipe}", Execution(precision=precision, layers="te"), missing or needs))
    return made


def _share(flops: float, seconds: float, roof: float) -> str:
    return f"{flops / seconds / roof:.1%} of the roof"


def _kernels(bench: Bench, name: str, work: Callable[[], object]) -> Iterator[Row]:
    """The kernels that one pass spends most of its time in, by torch's profiler."""
    on_cuda = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        work()
        if on_cuda:
            torch.cuda.synchronize()
    times = {
        event.key: (event.self_device_time_total if on_cuda else event.self_cpu_time_total)
        for event in profiler.key_averages()
        if not on_cuda or event.device_type == torch._C._autograd.DeviceType.CUDA
    }
    total = sum(times.values()) or 1.0
    for key in sorted(times, key=lambda one: -times[one])[:KERNELS]:
        yield measured(f"  {name}: {key[:60]}", times[key] / 1e3, "ms", f"{times[key] / total:.1%}")
