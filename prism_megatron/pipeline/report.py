"""Writes both files of a pipeline's report, and gives the table for the terminal."""

from __future__ import annotations

import json

from prism_megatron.disk import write_atomically, writing
from prism_megatron.pipeline.page import write_pipeline_page
from prism_megatron.pipeline.plan import Plan
from prism_megatron.pipeline.play import identities_of
from prism_megatron.pipeline.results import results_of
from prism_megatron.pipeline.samples import samples_of
from prism_megatron.pipeline.state import State
from prism_megatron.pipeline.table import lines_of, text_table
from prism_megatron.run.files import REPORT

DOCUMENT = "report.json"


def write_pipeline_report(plan: Plan, state: State) -> list[str]:
    """Write ``report.json`` and ``report.html`` of what is done; returns the table as lines of text.

    Raises PrismError for a damaged file of a step, DiskError where the disk takes no more.
    """
    results = results_of(plan, state, identities_of(plan, state))
    names = {one["name"] for one in results["steps"]}
    samples = samples_of(plan, [step for step in plan.steps if step.key in names])
    with writing(plan.output):
        write_atomically(plan.output / DOCUMENT, f"{json.dumps(results, indent=1)}\n")
        write_pipeline_page(plan.output / REPORT, plan, results, samples)
    return text_table(lines_of(plan, results))
