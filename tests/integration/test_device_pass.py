"""Claim: a step of every stage would run on a GPU: no tensor is left on the host, and nothing waits for the device.

The real code plays on tensors that have shapes and no contents, in a process of its own (``prism_megatron.forecast``,
docs/device_pass.md). Widths, vocabularies and vision widths are as published; quick cases have four language layers
(one with experts) and two vision blocks, the ``long`` ones are whole.
Blind spot: values, kernels that do not exist for a GPU, Transformer Engine's layers, virtual pipeline stages, offload.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import RouterLosses
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.presets import preset
from prism_megatron.engine.host.memory import bytes_of_rank
from prism_megatron.forecast.case_file import write_cases
from prism_megatron.forecast.plays import Case, Play, provider_of
from prism_megatron.forecast.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
TOWERS = Towers(2, experts_per_tower=4, top_k=2)
SHARED = Workload(share_prompts=True)


def short(name: str, *, layers: int = 4) -> Qwen3VLShape:
    """A published model with few layers."""
    shape = preset(name)
    return replace(
        shape,
        text=replace(shape.text, num_layers=layers),
        vision=replace(shape.vision, depth=2, taps=(0, 1)),
    )


QUICK = {
    "sft, first of PP2, TP2 with sequence parallelism, recomputed": Case(
        "sft", short("4B"), ParallelConfig(tp=2, pp=2, sp="on"), 0, 4, recompute=RecomputeConfig("full")
    ),
    "align, last of PP2, TP2 with sequence parallelism, shared prompts": Case(
        "align", short("4B"), ParallelConfig(tp=2, pp=2, sp="on"), 3, 4, work=SHARED
    ),
    "rlvr, CP2, shared prompts": Case("rlvr", short("4B"), ParallelConfig(cp=2), 1, 2, work=SHARED),
    "judge, last of PP2, TP2 EP2, load balancing": Case(
        "judge", short("2B"), ParallelConfig(tp=2, pp=2, ep=2), 3, 4, towers=TOWERS, load_balance=0.01
    ),
    "judge, first of PP2, CP2, dense, shared prompts": Case(
        "judge", short("2B"), ParallelConfig(cp=2, pp=2), 0, 4, work=SHARED
    ),
    "judge, last of PP2, CP2, shared prompts": Case(
        "judge", short("2B"), ParallelConfig(cp=2, pp=2), 3, 4, towers=TOWERS, work=SHARED
    ),
    "sft with experts, TP2 EP4, router losses": Case(
        "sft", short("30B-A3B", layers=1), ParallelConfig(tp=2, ep=4), 3, 4, router_losses=RouterLosses(0.01, 0.001)
    ),
}

LAYOUTS: Mapping[str, tuple[ParallelConfig, int]] = {
    "2B": (ParallelConfig(tp=2, pp=2), 4),
    "4B": (ParallelConfig(tp=4, pp=2, sp="on"), 8),
    "8B": (ParallelConfig(tp=4, pp=2), 8),
    "32B": (ParallelConfig(tp=8, pp=4, sp="on"), 32),
    "30B-A3B": (ParallelConfig(tp=2, pp=2, ep=4), 8),
    "235B-A22B": (ParallelConfig(tp=4, pp=2, ep=32), 64),
}


def lines_of(cases: Mapping[str, Case], folder: Path) -> dict[str, dict[str, Any]]:
    """What a child process says of each case."""
    file = folder / "cases.json"
    write_cases(file, list(cases.values()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "prism_megatron.forecast", str(file)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return dict(zip(cases, map(json.loads, child.stdout.splitlines()), strict=True))


def check(name: str, line: Mapping[str, Any], case: Case) -> None:
    """The case held, and what it counted is plausible."""
    assert "error" not in line, f"{name}: {line['error']}"
    counted = line["counted"]
    gib = {part: f"{size / 2**30:.2f}" for part, size in counted.items()}
    print(f"{name}: {gib} GiB, {line['cpu_seconds']:.1f} s of CPU")
    assert min(counted.values()) > 0
    if case.parallel.pp == 1:
        check_held(case, counted)


def check_held(case: Case, counted: Mapping[str, int]) -> None:
    """What is held between steps is what the formula says, but for Megatron's padding of buffers: 0.1 % at these sizes.

    The optimizer's part has what is small and nowhere else, such as the routers' counts.
    """
    held = bytes_of_rank(
        provider_of(case).weight_mappings(),
        case.parallel,
        world_size=case.world_size,
        dtype=case.dtype,
        is_frozen=lambda _name: False,
    )
    for part, size in dataclasses.asdict(held).items():
        assert counted[part] == pytest.approx(size, rel=1e-3), part


@pytest.fixture(scope="module")
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Those of the quick cases that were asked for: one process plays all of them."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    return lines_of({name: case for name, case in QUICK.items() if name in asked}, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", QUICK)
def test_a_step_holds(name: str, lines: dict[str, dict[str, Any]]) -> None:
    """Claim: see the module."""
    check(name, lines[name], QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_published_models_hold(name: str, tmp_path: Path) -> None:
    """Claim: the same at whole depth, for alignment's update on the first and the last rank of a layout, and, of a
    dense model, for a discriminator made of it."""
    parallel, world_size = LAYOUTS[name]
    shape = preset(name)
    plays: tuple[Play, ...] = ("align",) if shape.text.experts else ("align", "judge")
    cases = {
        f"{name} {play} rank {rank}": Case(
            play, shape, parallel, rank, world_size, work=Workload(prompts=max(2, world_size // 8)), towers=TOWERS
        )
        for play in plays
        for rank in (0, world_size - 1)
    }
    for case, line in lines_of(cases, tmp_path).items():
        check(case, line, cases[case])
