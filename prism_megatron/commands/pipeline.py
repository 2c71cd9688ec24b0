"""All stages one after the other, each evaluated, from one file: ``prism-pipeline --config FILE --output RUN``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_megatron.commands import align, evaluate, rlvr, select_prompts, sft, warm_start
from prism_megatron.commands.report import VIEWS
from prism_megatron.config.cli import parse_flags
from prism_megatron.config.pipeline.file import EVALUATE, read_pipeline
from prism_megatron.config.pipeline.flags import PipelineConfig, check_flags
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.config.stages.select_prompts import SelectPromptsConfig
from prism_megatron.config.stages.sft import SFTConfig
from prism_megatron.config.stages.warm_start import WarmStartConfig
from prism_megatron.config.tools.evaluate import EvaluateConfig
from prism_megatron.conversion.checkpoints.model_names import MiniPolicy, policy_folder
from prism_megatron.disk import writing
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import ConfigError, PrismError
from prism_megatron.game.controls import Controls
from prism_megatron.pipeline.plan import Plan, check_all, plan_of
from prism_megatron.pipeline.play import identities_of, play
from prism_megatron.pipeline.process import Processes
from prism_megatron.pipeline.report import write_pipeline_report
from prism_megatron.pipeline.state import STATE, State
from prism_megatron.pipeline.tools import Kind, Tool, Way
from prism_megatron.run.alone import alone_in
from prism_megatron.run.folder import folder_of_new_run
from prism_megatron.stages.select_prompts.choice import SELECTED

_MODEL: Way = ("model", "model")
_BOTH: Mapping[Way, Kind] = {_MODEL: "policy", ("discriminator", "discriminator"): "discriminator"}


def parse(argv: Sequence[str]) -> PipelineConfig:
    """The flags that were given. Raises ConfigError for those that cannot go together."""
    config = parse_flags(PipelineConfig(), argv, description=PipelineConfig.__doc__ or "")
    check_flags(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: that of the step that failed, 3 where a signal ended the pipeline."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        _run(config)
    except PrismError as error:
        return report_error(error)
    return 0


def _run(config: PipelineConfig) -> None:
    # What is to be played is known, and checked, before anything is written.
    tools = tools_of_users()
    file = read_pipeline(config.config, tools=[name for name in tools if name != EVALUATE])
    if config.output is not None and config.resume == "no" and (config.output / STATE).exists():
        raise ConfigError(
            f"--output {config.output} holds an earlier pipeline; go on with it by --resume auto, or give another "
            "folder"
        )
    with writing(config.output or Path("runs")):
        output = (config.output or folder_of_new_run("pipeline")).resolve()
    try:
        plan = plan_of(file, config, tools, output)
        check_all(plan)
    except PrismError:
        if config.output is None:
            output.rmdir()
        raise
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with alone_in(output, command="prism-pipeline"), Processes() as processes:
        state = State(output)
        identities_of(plan, state)  # what is read can be read
        _say(_opening(plan))
        play(plan, state, processes, report=lambda: _report(plan, state), say=_say)
        for line in write_pipeline_report(plan, state):
            print(line, flush=True)
        _say(f"wrote {output / 'report.html'}")


def tools_of_users() -> dict[str, Tool]:
    """Those that may play a stage, and the one that evaluates."""
    return {
        "sft": Tool(
            "sft", _command("sft"), SFTConfig, sft.parse, sft.check,
            inputs={_MODEL: "policy"}, makes={"policy": None}, view=VIEWS["sft"],
            policy_steps=lambda config: config.steps, mini_policy=lambda config: _mini(config.model.mini, "base"),
        ),
        "warm_start": Tool(
            "warm_start", _command("warm-start"), WarmStartConfig, warm_start.parse, warm_start.check,
            inputs=_BOTH, makes={"discriminator": None}, view=VIEWS["warm-start"],
            mini_policy=lambda config: _mini(config.model.mini, "policy"),
        ),
        "align": Tool(
            "align", _command("align"), AlignConfig, align.parse, align.check,
            inputs=_BOTH, makes={"policy": None, "discriminator": None}, view=VIEWS["align"],
            policy_steps=_policy_steps, mini_policy=lambda config: _mini(config.model.mini, "policy"),
        ),
        "select_prompts": Tool(
            "select_prompts", _command("select-prompts"), SelectPromptsConfig, select_prompts.parse,
            select_prompts.check,
            inputs={("model",): "policy"}, makes={"prompts": SELECTED}, resume=(),
            chosen_by=(("keep_from",), ("keep_to",)), mini_policy=lambda config: _mini(config.mini, "aligned"),
        ),
        "rlvr": Tool(
            "rlvr", _command("rlvr"), RLVRConfig, rlvr.parse, rlvr.check,
            inputs={_MODEL: "policy", ("prompts",): "prompts"}, makes={"policy": None}, view=VIEWS["rlvr"],
            policy_steps=lambda config: config.steps, mini_policy=lambda config: _mini(config.model.mini, "aligned"),
        ),
        EVALUATE: Tool(
            EVALUATE, _command("evaluate"), EvaluateConfig, evaluate.parse, evaluate.check,
            inputs={("model",): "policy", ("against",): "answers"}, makes={"answers": None}, resume=(),
        ),
    }  # fmt: skip


def _command(name: str) -> Sequence[str]:
    return ("-m", "prism_megatron", name)


def _mini(world: Any, which: MiniPolicy) -> Path:
    return policy_folder(None, of_the_mini=which, mini=world)


def _policy_steps(config: AlignConfig) -> int:
    """Steps of an alignment that update the policy."""
    controls = Controls(config.game)
    return sum(controls.decide(step).update_policy for step in range(config.steps))


def _opening(plan: Plan) -> str:
    skipped = f"; skipped: {', '.join(plan.skipped)}" if plan.skipped else ""
    return f"folder {plan.output}; {len(plan.steps)} steps: {', '.join(step.key for step in plan.steps)}{skipped}"


def _report(plan: Plan, state: State) -> None:
    """A report in between is no reason to end."""
    try:
        write_pipeline_report(plan, state)
    except (OSError, PrismError) as error:
        _say(f"the report could not be written: {error}")


def _say(text: str) -> None:
    print(f"pipeline: {text}", flush=True)
