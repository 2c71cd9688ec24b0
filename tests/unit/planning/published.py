"""Layouts and times that others have published, as runs of ours (see each for what differs)."""

from __future__ import annotations

from dataclasses import replace

from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.presets import preset
from prism_megatron.config.stages.demonstrations import DemonstrationsConfig
from prism_megatron.config.stages.sft import SFTConfig
from prism_megatron.planning.build import Run

SMALL_IMAGE = 64 * 32 * 32
"""Pixels of 64 tokens: what these rows show beside text."""
FULL = RecomputeConfig("full", recompute_vision=True)


def demonstrations(
    model: str,
    parallel: ParallelConfig,
    *,
    gpus: int,
    rows: int,
    at_once: int = 1,
    layers: int | None = None,
    recompute: RecomputeConfig | None = None,
    frozen: bool = True,
    tokens: int = 4096,
) -> Run:
    """Fine-tuning on ``rows`` of 4,096 tokens a step, ``at_once`` in a micro-batch."""
    shape = preset(model)
    if layers is not None:
        shape = replace(shape, text=replace(shape.text, num_layers=layers))
    data = DemonstrationsConfig(
        max_tokens=tokens, max_pixels=SMALL_IMAGE, rows_per_step=rows, rows_per_microbatch=at_once, packing=at_once == 1
    )
    config = SFTConfig(
        parallel=parallel,
        recompute=recompute or RecomputeConfig(),
        data=data,
        steps=1,
        freeze=ALL_VISION if frozen else (),
    )
    return Run("sft", config, shape, gpus)


MUST_FIT = {
    "Bridge, performance: 235B on 256, TP2 PP8 EP32": demonstrations(
        "235B-A22B",
        ParallelConfig(tp=2, pp=8, ep=32, first_stage_layers=11, last_stage_layers=11),
        gpus=256,
        rows=1024,
    ),
    "Bridge, performance: 30B on 16, PP2 EP8": demonstrations("30B-A3B", ParallelConfig(pp=2, ep=8), gpus=16, rows=512),
    "Bridge, SFT: 8B on 2, TP2": demonstrations(
        "8B", ParallelConfig(tp=2, sp="on"), gpus=2, rows=32, at_once=2, recompute=FULL, frozen=False
    ),
    "Bridge, SFT: 30B on 8, EP8": demonstrations(
        "30B-A3B", ParallelConfig(ep=8), gpus=8, rows=32, at_once=2, recompute=FULL, frozen=False
    ),
    "verl: 30B on 8, TP4 EP8 ETP1": demonstrations(
        "30B-A3B", ParallelConfig(tp=4, ep=8, etp=1), gpus=8, rows=32, recompute=FULL, frozen=False
    ),
    "verl: 235B on 64, TP4 PP8 CP2 EP8": demonstrations(
        "235B-A22B",
        ParallelConfig(tp=4, pp=8, cp=2, ep=8, first_stage_layers=11, last_stage_layers=11),
        gpus=64,
        rows=32,
        recompute=FULL,
        frozen=False,
    ),
}
"""Virtual stages are left out: 94 layers in 8 stages of 4 chunks need halves of layers that this project has not."""

TOO_LARGE = demonstrations(
    "235B-A22B", ParallelConfig(tp=4, ep=32), gpus=32, rows=32, at_once=2, recompute=FULL, frozen=False
)
"""Bridge's SFT recipe of 235B names 32 GPUs, TP4 EP32; on which device is not said."""

OUT_OF_MEMORY = demonstrations(
    "30B-A3B", ParallelConfig(tp=4, ep=8, etp=1), gpus=8, rows=32, recompute=FULL, frozen=False
)
"""ms-swift #8084: 8×A100-80, packed rows of 4,096."""

MEASURED = {
    # 52 layers of the 32B's make 27.0 B parameters; the published model's own sizes are not ours.
    "27B on 16 GB200": (
        demonstrations("32B", ParallelConfig(tp=2, sp="on"), gpus=16, rows=32, at_once=2, layers=52), "gb200-186", 1.679
    ),
    "8B on 16 H100": (demonstrations("8B", ParallelConfig(), gpus=16, rows=1024), "h100-80", 25.1),
    "30B on 16 H100, EP16": (demonstrations("30B-A3B", ParallelConfig(ep=16), gpus=16, rows=1024), "h100-80", 30.3),
    "30B on 16 H100, PP2 EP8": (
        demonstrations("30B-A3B", ParallelConfig(pp=2, ep=8), gpus=16, rows=512), "h100-80", 20.1
    ),
    "235B on 256 GB300": (
        demonstrations(
            "235B-A22B",
            ParallelConfig(pp=4, ep=32, first_stage_layers=23, last_stage_layers=23),
            gpus=256,
            rows=1024,
        ),
        "gb300-279",
        14.9,
    ),
}  # fmt: skip
"""Runs, devices, and seconds of a step that somebody has measured."""
