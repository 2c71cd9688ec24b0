"""Short runs on the mini whose every row is kept, and how they are played on ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from prism_megatron.commands import align, warm_start
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.merge import to_plain
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.stages.align.build import align_on
from prism_megatron.stages.warm_start.build import warm_up_on

SMALL = ("--steps", "6", "--prompts-per-step", "4", "--save-every", "2")


@dataclass(frozen=True)
class GoldenRun:
    """A command line of the mini and the layout it runs in."""

    stage: Literal["align", "warm-start"]
    flags: tuple[str, ...]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ranks: int = 1

    def text(self) -> str:
        """The resolved configuration as YAML, without how the run is kept, watched and made faster."""
        plain = to_plain(self._config(()))
        return yaml.safe_dump(
            {name: part for name, part in plain.items() if name not in ("checkpoint", "run", "speed")}
        )

    def play(self, world: World, output: Path) -> None:
        """One rank's part of the run."""
        extra = ("--output", str(output))
        if self.stage == "align":
            align_on(world, align.parse((*self.flags, *extra)))
        else:
            warm_up_on(world, warm_start.parse((*self.flags, *extra)))

    def _config(self, extra: tuple[str, ...]) -> Any:
        return (align if self.stage == "align" else warm_start).parse((*self.flags, *extra))


ALIGN = (*SMALL, "--rollouts-per-prompt", "4", "--tokens-per-microbatch", "1024")
WARM = (*SMALL, "--tokens-per-microbatch", "1024", "--min-auc", "0", "--gate-prompts", "4", "--gate-rollouts", "2")
RUNS: Mapping[str, GoldenRun] = {
    "align_tp1": GoldenRun("align", (*ALIGN, "--replay-prompts", "2", "--probe-every", "3")),
    "align_tp2_pp2": GoldenRun(
        "align",
        (*ALIGN, "--tp", "2", "--pp", "2", "--credit", "segment", "--temperature", "0.8"),
        ParallelConfig(tp=2, pp=2),
        4,
    ),
    "align_dp2": GoldenRun(
        "align",
        (*ALIGN, "--replay-prompts", "2", "--rollbacks", "3", "--collapse-valid-share", "1", "--collapse-steps", "1"),
        ParallelConfig(),
        2,
    ),
    "warm_start_tp1": GoldenRun("warm-start", WARM),
    "warm_start_tp2_pp2": GoldenRun("warm-start", (*WARM, "--tp", "2", "--pp", "2"), ParallelConfig(tp=2, pp=2), 4),
    "warm_start_dp2": GoldenRun("warm-start", (*WARM, "--rollouts-per-prompt", "3"), ParallelConfig(), 2),
}


def play(world: World, name: str, output: Path, flags: tuple[str, ...] = ()) -> str:
    """The run called ``name``, with more ``flags``; returns what ended it, if anything did."""
    run = RUNS[name]
    try:
        replace(run, flags=(*run.flags, *flags)).play(world, output)
    except PrismError as error:
        return str(error)
    return ""


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The run's rows without what the machine says: clocks and memory."""
    return [
        {key: value for key, value in row.items() if key != "time" and not key.startswith(("seconds/", "memory/"))}
        for row in read_metrics(output / "metrics.jsonl")
    ]


def provenance(name: str) -> dict[str, str]:
    """What the rows depend on beside the code."""
    return {
        **{package: version(package) for package in ("torch", "megatron-core", "transformers", "numpy")},
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "config": hashlib.sha256(RUNS[name].text().encode()).hexdigest(),
    }


def _processor() -> str:
    """The model of the CPU: libraries choose kernels by it, and these round differently."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
