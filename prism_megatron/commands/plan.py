"""Memory, least times and layouts of a run before it starts: ``prism-plan align --model 4B --tp 4 --gpus 8``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import tyro

from prism_megatron.commands import align, rlvr, sft
from prism_megatron.commands.starting.named_models import named_shapes, policy_shape
from prism_megatron.config.cli import inputs_named, named_value, parse_flags
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.config.fields import check_fields
from prism_megatron.config.presets import PRESETS, preset
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.tools.plan import PlanConfig, SizesConfig
from prism_megatron.config.validate import towers_layout
from prism_megatron.engine.launch import quiet_vendors, report_error
from prism_megatron.errors import PrismError

if TYPE_CHECKING:
    from prism_megatron.planning.build import Run, StageName

STAGES = {"sft": sft, "align": align, "rlvr": rlvr}
SEARCHED_GPUS = 8


def say(text: str) -> None:
    """A line of a table."""
    print(text, flush=True)


def tell(text: str) -> None:
    """A line for whoever watches, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 where what was asked about fits, 1 where it does not, or cannot be."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        quiet_vendors()
        if words and words[0] in STAGES:
            return _plan_run(cast("StageName", words[0]), words[1:])
        sizes = parse_flags(SizesConfig(), words, description=SizesConfig.__doc__ or "")
        return _find_smallest(sizes) if sizes.smallest else _plan_sizes(sizes)
    except PrismError as error:
        return report_error(error)


def _plan_run(stage: StageName, argv: Sequence[str]) -> int:
    """The layout that the stage's own flags ask for, and others where they are wanted."""
    from prism_megatron.planning.gpus import gpu_of
    from prism_megatron.planning.report import candidate_values, plan_of, values_of
    from prism_megatron.planning.search import search
    from prism_megatron.planning.tables import layout_lines, lines_of

    description = f"{PlanConfig.__doc__}\n\nThe flags below, and all those of prism-{stage}."
    config, rest = tyro.cli(
        PlanConfig, default=PlanConfig(), args=list(argv), description=description, return_unknown_args=True
    )
    check_fields(config)
    run, gpu = _run_of(stage, rest, config.gpus), gpu_of(config.gpu)
    plan = plan_of(run, gpu, play=config.play, share=config.share_of_roof)
    fitting, others = search(run, gpu, wanted=config.layouts, play=config.play)
    if config.json:
        values = values_of(plan)
        values["layouts"] = [candidate_values(one) for one in (*fitting, *others)]
        say(json.dumps(values))
    else:
        for line in (*lines_of(plan), *layout_lines(fitting, others)):
            say(line)
    return 0 if plan.memory.fits else 1


def _run_of(stage: StageName, argv: Sequence[str], gpus: int | None) -> Run:
    """The run of a stage's flags, whose models may be published sizes. Raises PrismError."""
    from prism_megatron.planning.build import Run

    config: Any = _parsed(stage, argv)
    name = config.model.model
    judge = towers = None
    if isinstance(config, AlignConfig):
        wanted = config.discriminator.discriminator
        if name not in PRESETS and wanted not in PRESETS:
            shape, judge = named_shapes(config.model, config.discriminator, scenes=config.data.data is None)
            towers = towers_layout(config, shape)
            return Run(stage, config, shape, gpus or smallest_world(config.parallel, towers), judge)
        judge = preset(wanted) if wanted in PRESETS else None
    shape = preset(name) if name in PRESETS else policy_shape(config.model)
    if isinstance(config, AlignConfig):
        towers = towers_layout(config, shape)
    return Run(stage, config, shape, gpus or smallest_world(config.parallel, towers), judge)


def _parsed(stage: StageName, argv: Sequence[str]) -> Any:
    """The stage's configuration. A plan of fine-tuning needs no demonstrations, and no number of steps without them."""
    has_end = inputs_named(argv, "data") or named_value(argv, "steps") or not inputs_named(argv, "model")
    if stage != "sft" or has_end:
        return STAGES[stage].parse(argv)
    return replace(sft.parse([*argv, "--steps", "1"]), steps=None)


def _plan_sizes(config: SizesConfig) -> int:
    """The paper's three stages of each size, on so many GPUs."""
    from prism_megatron.planning.gpus import gpu_of
    from prism_megatron.planning.paper import STAGES as PAPER_STAGES
    from prism_megatron.planning.paper import paper_run
    from prism_megatron.planning.report import candidate_values, plan_of, values_of
    from prism_megatron.planning.search import search
    from prism_megatron.planning.tables import layout_lines, lines_of

    gpu, found, values = gpu_of(config.gpu), True, []
    for model in config.model:
        for stage in PAPER_STAGES:
            run = paper_run(stage, model, gpus=config.gpus or SEARCHED_GPUS, judge=config.judge)
            tell(f"{model} {stage}: comparing layouts")
            fitting, others = search(run, gpu, wanted=max(1, config.layouts), play=config.play)
            found = found and bool(fitting)
            if fitting:
                plan = plan_of(fitting[0].run, gpu, play=False, share=config.share_of_roof)
                plan = type(plan)(plan.run, gpu, fitting[0].memory or plan.memory, plan.phases, plan.hours)
                values.append({"model": model, **values_of(plan)})
                lines = [f"{model} {line}" if not number else line for number, line in enumerate(lines_of(plan))]
            else:
                values.append({"model": model, "stage": stage, "gpus": run.world_size})
                lines = [f"{model} {stage} on {run.world_size} x {gpu.name}: no layout fits"]
            values[-1]["layouts"] = [candidate_values(one) for one in (*fitting, *others)]
            if not config.json:
                for line in (*lines, *layout_lines(fitting, others), ""):
                    say(line)
    if config.json:
        say(json.dumps(values))
    return 0 if found else 1


def _find_smallest(config: SizesConfig) -> int:
    """The table of smallest numbers."""
    from prism_megatron.planning.gpus import gpu_of
    from prism_megatron.planning.paper import STAGES as PAPER_STAGES
    from prism_megatron.planning.paper import smallest
    from prism_megatron.planning.report import smallest_values
    from prism_megatron.planning.tables import smallest_lines

    gpu = gpu_of(config.gpu)
    rows = [
        smallest(model, stage, gpu, say=tell, play=config.play, judge=config.judge)
        for model in config.model
        for stage in PAPER_STAGES
    ]
    found = [row for row in rows if row is not None]
    if config.json:
        say(json.dumps([smallest_values(row) for row in found]))
    else:
        for line in smallest_lines(found):
            say(line)
    return 0 if len(found) == len(rows) else 1
