"""Tiny models on the device beside transformers on the CPU, forward and backward: layers of torch, of Transformer
Engine, and in FP8."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.engine.host.execution import Execution
from prism_megatron.gpu_check.bench import Bench
from prism_megatron.gpu_check.layer import executions
from prism_megatron.gpu_check.rows import Row, skipped, within
from prism_megatron.parity.compare import Outcome, worst_first
from prism_megatron.parity.matrix import Block, measure
from prism_megatron.parity.oracle import load_transformers, transformers_outcome
from prism_megatron.parity.ranks import build_engine, run_samples
from prism_megatron.parity.samples import sample_sets
from prism_megatron.parity.tiny import prepare, tiny_config, tiny_model

TRIED = ("dense tied", "MoE")
_FP8_MODEL: Mapping[str, Any] = {"taps": (0, 1, 2), "tied": False, "vocab": 301, "hidden": 128, "ffn": 160}
"""Sides divide by 32, which FP8 multiplies in blocks of."""
_FP8_SET = "three sizes"
_OUTPUT_BITS, _GRADIENT_BITS = 4, 5
"""How many bits fewer than bf16's 8 the mantissas have that are multiplied: E4M3's forward, E5M2's backward."""


def check_parity(bench: Bench) -> Iterator[Row]:
    """Dense and MoE in fp32 and bf16, then FP8."""
    available = executions(bench)
    engines = [one for one in available if one[1].precision.fp8 == "none"]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as root:
        for model in TRIED:
            folder = Path(root) / model
            prepare(model, folder)
            for name, execution, why_not in engines:
                if why_not:
                    yield skipped(f"{model}, layers of {name}", why_not)
                else:
                    yield from _cells(bench, folder, model, name, execution)
        for name, execution, why_not in available:
            if execution.precision.fp8 == "none":
                continue
            if why_not:
                yield skipped(f"dense, {name}", why_not)
            else:
                yield from fp8_rows(bench, Path(root) / name, name, execution)


def _cells(bench: Bench, folder: Path, model: str, name: str, execution: Execution) -> Iterator[Row]:
    """The worst of all sample sets, padded and packed.

    Transformer Engine multiplies fp32 in TF32, so that its layers are compared in bf16 alone.
    """
    for dtype in (torch.bfloat16,) if execution.layers == "te" else (torch.float32, torch.bfloat16):
        cells = measure(bench.world, folder, Block(model, "TP1", dtype=dtype, execution=execution))
        logits, gradients = [], []
        for cell in cells:
            assert cell.difference is not None and cell.tolerance is not None
            where = f"{cell.packing}, {cell.samples}"
            logits.append((where, cell.difference.logits_max_abs))
            parameter, error = cell.difference.worst
            gradients.append((f"{where}: {parameter}", error))
        assert cells[0].tolerance is not None
        limits = cells[0].tolerance.logits, cells[0].tolerance.gradients
        for part, errors, limit in zip(("logits", "gradients"), (logits, gradients), limits, strict=True):
            where, worst = worst_first(errors)[0]
            yield within(f"{model}, {name}, {cells[0].dtype}: {part}", worst, limit, note=where)


def fp8_rows(bench: Bench, folder: Path, name: str, execution: Execution) -> Iterator[Row]:
    """All logits, and all gradients, of a dense model in FP8: apart from fp32 by what transformers in bf16 is, times
    how much coarser FP8 rounds."""
    tiny_model(tiny_config(**_FP8_MODEL)).save_pretrained(folder)
    shape, samples = Qwen3VLShape.from_folder(folder), sample_sets()[_FP8_SET]
    exact, rounded = (
        transformers_outcome(load_transformers(folder, shape, dtype=dtype, device=torch.device("cpu")), samples, shape)
        for dtype in (torch.float32, torch.bfloat16)
    )
    engine = build_engine(bench.world, folder, shape, dtype=torch.bfloat16, execution=execution)
    multiple = execution.precision.length_multiple(bench.world.parallel)
    found = run_samples(engine, shape, samples, pack=True, multiple_of=multiple).outcome
    assert found is not None
    for part, bits, mine, theirs in zip(
        ("logits", "gradients"), (_OUTPUT_BITS, _GRADIENT_BITS), apart(found, exact), apart(rounded, exact), strict=True
    ):
        yield within(
            f"dense, {name}, packed: {part}", mine, 2**bits * theirs, note=f"2^{bits} times bf16's {theirs:.2g}"
        )


def apart(ours: Outcome, exact: Outcome) -> tuple[float, float]:
    """Distances of all logits and of all gradients, relative to their norms."""
    return (
        _relative(list(ours.logits), list(exact.logits)),
        _relative([ours.gradients[name] for name in exact.gradients], list(exact.gradients.values())),
    )


def _relative(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    mine, theirs = (torch.cat([one.double().flatten() for one in of]) for of in (ours, exact))
    return float((mine - theirs).norm() / theirs.norm())
