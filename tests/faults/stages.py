"""The smallest runs of each stage that still save several times, and what they come to."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.observability.metrics import read_metrics
from tests.conftest import REPOSITORY
from tests.faults.draw import Setting
from tests.faults.served import answering_python
from tests.integration.test_align_records import write_records
from tests.integration.test_resume import CLOCKS

STEPS = 4
_REWARD = ("--reward", "tests.faults.reward:by_text")
_ASKED = ("--system-prompt", "None", "--max-response-tokens", "96", "--dtype", "fp32")
_GROUPS = ("--prompts-per-step", "2", "--rollouts-per-prompt", "3")
_TRAINED = ("--dtype", "fp32", "--steps", str(STEPS), "--save-every", "1", "--resume", "auto", "--report-every", "2")
_TOOLS = {"sft": "run_sft", "warm-start": "run_warm_start", "align": "run_align", "rlvr": "run_rlvr",
          "pipeline": "run_pipeline", "evaluate": "evaluate", "select": "select_prompts"}  # fmt: skip
_FLAGS = {
    "sft": (*_TRAINED, "--forecast", "off", "--max-tokens", "220", "--rows-per-step", "2", "--readers", "1",
            "--keep-last", "2"),
    "warm-start": (*_TRAINED, *_GROUPS, "--min-auc", "0", "--gate-prompts", "2", "--gate-rollouts", "2"),
    "align": (*_TRAINED, *_GROUPS, "--forecast", "off", "--keep-last", "2"),
    "rlvr": (*_TRAINED, *_GROUPS, *_REWARD, "--forecast", "off", "--reward-preset", "sum", "--eval-prompts", "0",
             "--save-async"),
    "pipeline": ("--resume", "auto"),
    "evaluate": (str(MINI_FOLDER / "policy"), *_ASKED, "--scenes", "24", "--samples", "1", "--questions-at-once", "4"),
    "select": ("--model", str(MINI_FOLDER / "aligned"), *_ASKED, *_REWARD, "--prompts-per-step", "2",
               "--rollouts-per-prompt", "3", "--keep-from", "0", "--keep-to", "1"),
}  # fmt: skip
_SERVED = ("--rollout", "sglang", "--rollout-servers", "1", "--rollout-probe-every", "0")
_PIPELINE = """
stages:
  sft:
    tool: sft
    steps: 2
    drift_scenes: 0
    data: {rows_per_step: 2}
    checkpoint: {save_every: 1}
  rlvr:
    tool: rlvr
    model: {mini: habits, model: "@sft"}
    exam: {eval_prompts: 0}
    steps: 2
    rollout: {prompts_per_step: 2, rollouts_per_prompt: 2}
    checkpoint: {save_every: 1}
evaluate: {scenes: 4, samples: 1, system_prompt: null, max_response_tokens: 96, questions_at_once: 2}
"""
_COMPARED = {
    "evaluate": ("answers.jsonl", "summary.json"),
    "select": ("pass_rates.jsonl", "selected.jsonl", "summary.json"),
}
"""Files of what trains nothing, which have to be equal to the byte."""


@dataclass(frozen=True)
class Inputs:
    """What all trials of a campaign read."""

    folder: Path

    @property
    def records(self) -> Path:
        return self.folder / "records"

    @property
    def python(self) -> Path:
        return self.folder / "fake" / "python"

    def make(self) -> None:
        """Write it all; once."""
        self.folder.mkdir()
        write_records(self.records, 24)
        answering_python(self.folder)
        (self.folder / "pipeline.yaml").write_text(_PIPELINE)


def command(setting: Setting, inputs: Inputs, output: Path, *, torchrun: bool) -> list[str]:
    """The first and every later try of a run."""
    stage = setting.stage
    flags = [*_FLAGS[stage], "--output", str(output)]
    if stage in ("sft", "select"):
        flags += ["--data", str(inputs.records)]
    if stage == "sft":
        flags += ["--index", str(inputs.folder / "index")]
    if stage == "pipeline":
        flags += ["--config", str(inputs.folder / "pipeline.yaml")]
    if setting.rollout == "served":
        flags += [*_SERVED, "--rollout-python", str(inputs.python)]
    if setting.ranks > 1:
        flags += ["--ranks" if stage in _COMPARED else "--tp", str(setting.ranks)]
    outer = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.ranks)] if torchrun else []
    return [sys.executable, *outer, str(REPOSITORY / "tools" / f"{_TOOLS[stage]}.py"), *flags]


def rows_of(output: Path) -> list[dict[str, Any]]:
    """Rows of all stages of a run, without what a clock or a meter of memory says."""
    rows = [row for path in sorted(output.rglob("metrics.jsonl")) if _counts(path) for row in read_metrics(path)]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


def results_of(setting: Setting, output: Path) -> dict[str, str]:
    """Digests of what a run made, by name: models and, of what trains nothing, all files that matter."""
    made = [path for path in output.rglob("*.safetensors") if _counts(path) and "hf" in path.parts]
    made += [output / name for name in _COMPARED.get(setting.stage, ())]
    if setting.stage == "pipeline":
        made += output.glob("stages/*/evaluation/answers.jsonl")
    digests = {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(made)}
    report = output / "report.json"
    if report.is_file():
        plain = json.loads(report.read_text())
        plain.pop("minutes")
        digests["report.json"] = json.dumps(plain, sort_keys=True)
    return digests


def _counts(path: Path) -> bool:
    """Whether a file is of the run itself: neither in a checkpoint nor of a try that was moved aside."""
    return not any(part in {"checkpoints", "rollout"} or part.startswith("earlier-") for part in path.parts)
