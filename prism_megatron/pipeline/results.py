"""What a pipeline came to so far, from the files of its steps: ``report.json``.

Nothing in it but the minutes depends on when, where, or in how many tries it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prism_megatron.config.json_file import read_object
from prism_megatron.config.pipeline.file import BASE
from prism_megatron.errors import DataError
from prism_megatron.evaluation.benchmark.folder import SUMMARY
from prism_megatron.observability.metrics import Row, read_metrics
from prism_megatron.pipeline.drift import drift_from
from prism_megatron.pipeline.identity import Identity
from prism_megatron.pipeline.plan import EVALUATIONS, STAGES, Plan, Step
from prism_megatron.pipeline.state import State
from prism_megatron.run.files import METRICS

FORMAT = 1
GREEDY, FORM, TOKENS = "greedy/accuracy", "greedy/in the asked form", "greedy/tokens"
"""Measures of an evaluation that the table shows."""
_OF_SELECTION = ("prompts", "selected", "keep_from", "keep_to", "accuracy", "histogram")


def results_of(plan: Plan, state: State, wanted: Mapping[str, Identity]) -> dict[str, Any]:
    """Every policy and stage that is done, in order, with its figures; then the minutes of each step.

    Raises DataError for a damaged file of a step.
    """
    done = [
        step
        for step in plan.steps
        if (record := state.records.get(step.key)) is not None and record.done and record.identity == wanted[step.key]
    ]
    return {
        "format": FORMAT,
        "title": plan.title,
        "skipped": list(plan.skipped),
        "steps": [{"name": step.key, "result": wanted[step.key].result, **_figures(step, plan)} for step in done],
        "left": [step.key for step in plan.steps if step not in done],
        "minutes": {step.key: round(state.records[step.key].seconds / 60, 2) for step in done},
    }


def rows_of(plan: Plan, step: Step) -> list[Row]:
    """Of a stage that plays steps; none of another one."""
    path = plan.output / step.key / METRICS
    return list(read_metrics(path)) if step.tool.view is not None and path.is_file() else []


def evaluation_of(results: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The figures of a policy by its stage's name, or of ``base``; None where it has not been evaluated."""
    return next((one for one in results["steps"] if one["name"] == f"{EVALUATIONS}/{name}"), None)


def _figures(step: Step, plan: Plan) -> dict[str, Any]:
    folder = plan.output / step.key
    summary = read_object(folder / SUMMARY, error=DataError)
    try:
        if step.key.startswith(EVALUATIONS):
            base = plan.output / EVALUATIONS / BASE
            drift = drift_from(base, folder) if folder != base and (base / SUMMARY).is_file() else None
            figures = {"figures": summary["figures"], "groups": summary["groups"]}
            return figures | {"against_base": _paired(summary), "drift_from_base": drift}
        if step.tool.view is None:
            return {"tool": step.tool.name, "selection": {name: summary[name] for name in _OF_SELECTION}}
        rows = rows_of(plan, step)
        view = step.tool.view.summarise(rows)
        return {"tool": step.tool.name, "steps": summary["steps"], "added_steps": step.added_steps, "last": dict(view)}
    except KeyError as error:
        raise DataError(f"{folder / SUMMARY} is damaged: {error} is missing; remove {folder}") from error


def _paired(summary: Mapping[str, Any]) -> list[Any]:
    """How it compares with the base; its folder, which differs from pipeline to pipeline, is left out."""
    against = summary.get("against")
    return [] if against is None else list(against["measures"])


def stages_of(plan: Plan) -> list[Step]:
    """The steps that are stages of the file."""
    return [step for step in plan.steps if step.key.startswith(f"{STAGES}/")]
