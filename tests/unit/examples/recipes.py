"""Every run of the recipes under ``examples/``, as its own files start it: stage, flags, ranks, and what a GPU holds.

Scripts are run with stand-ins for Slurm's commands, and say by themselves how many ranks they start with which flags.
This is the one place that a check of all recipes asks: :func:`every_run`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prism_megatron.commands import align, rlvr, select_prompts, sft, warm_start
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.pipeline.file import read_pipeline
from prism_megatron.config.presets import preset
from prism_megatron.config.yaml_file import write_yaml

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SIZES = {
    "single_node_4b": "4B",
    "single_node_8b": "8B",
    "slurm_30b_a3b": "30B-A3B",
    "slurm_235b": "235B-A22B",
    "kubernetes": "4B",
    "skypilot": "8B",
}
"""The policy of each folder."""
JUDGE = "2B"
"""What all discriminators are made of."""
DEVICE_GIB = 79.0
"""GiB that CUDA tells of a card of 80 GB."""
GPUS_OF_A_HOST = 8
STAGES = ("sft", "warm_start", "align", "rlvr")
COMMANDS: Mapping[str, Any] = {
    "sft": sft,
    "warm_start": warm_start,
    "align": align,
    "rlvr": rlvr,
    "select_prompts": select_prompts,
}

# Steps run beside each other: each writes its line at once, and training lasts until the servers' line is there.
_FAKE_SRUN = """#!/usr/bin/env bash
python3 - "$@" <<'PY'
import json, os, pathlib, sys, time
names = ("NNODES", "NPROC", "MASTER_ADDR", "MAX_MINUTES", "PRISM_ROLLOUT_API_KEY")
line = json.dumps({"words": sys.argv[1:], "set": {name: os.environ.get(name) for name in names}}) + "\\n"
log = os.open(os.environ["SRUN_LOG"], os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
os.write(log, line.encode())
while "--rollout-urls" in sys.argv and "serve_policy.sh" not in pathlib.Path(os.environ["SRUN_LOG"]).read_text():
    time.sleep(0.01)
PY
"""
_FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then
    for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do echo "node-$i"; done
else
    echo "$@" >>"$SCONTROL_LOG"
fi
"""


@dataclass(frozen=True)
class Run:
    """One stage of a recipe. ``argv`` are the words of its tool, ``ranks`` are processes of all hosts together."""

    recipe: str
    stage: str
    argv: Sequence[str]
    ranks: int
    ranks_of_a_host: int
    device_gib: float = DEVICE_GIB

    @property
    def policy(self) -> Qwen3VLShape:
        return preset(SIZES[self.recipe])

    @property
    def judge(self) -> Qwen3VLShape:
        return preset(JUDGE)

    def config(self) -> Any:
        """As the stage's command reads it."""
        return _parsed(self.stage, tuple(self.argv))

    def __str__(self) -> str:
        return f"{self.recipe}/{self.stage}"


@functools.cache
def _parsed(stage: str, argv: tuple[str, ...]) -> Any:
    return COMMANDS[stage].parse(argv)


def every_run(home: Path) -> list[Run]:
    """All of them; ``home``, the working directory of whoever asks, gets the folders and files that they name."""
    for folder in ("data/demonstrations", "data/records"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    runs = [*_of_pipeline("single_node_4b", home), *_of_pipeline("single_node_8b", home)]
    runs += [_of_job(recipe, stage, home) for recipe in ("slurm_30b_a3b", "slurm_235b") for stage in STAGES]
    return [*runs, _of_trainjob(home), _of_sky(home)]


def _of_pipeline(recipe: str, home: Path) -> list[Run]:
    """The stages, each with its section as its own file; files that stages leave to others stand in for them."""
    file = read_pipeline(EXAMPLES / recipe / "pipeline.yaml", tools=tuple(COMMANDS))
    runs = []
    for section in file.stages:
        values = plain(section.values)
        if str(values.get("prompts", "")).startswith("@"):
            (home / "selected.jsonl").touch()
            values["prompts"] = "selected.jsonl"
        path = home / f"{recipe}-{section.name}.yaml"
        path.write_text(write_yaml(values), encoding="utf-8")
        ranks = _processes(section.launcher or file.launcher)
        runs.append(Run(recipe, section.tool, ("--config", str(path)), ranks, ranks))
    return runs


def _processes(launcher: Sequence[str]) -> int:
    assert launcher[:2] == ("torchrun", "--standalone")
    return int(launcher[launcher.index("--nproc-per-node") + 1])


def plain(values: Any) -> Any:
    """Sections as dicts."""
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    return [plain(value) for value in values] if isinstance(values, list) else values


def _of_job(recipe: str, stage: str, home: Path) -> Run:
    (*_, trained) = steps_of_job(recipe, stage, home)
    words = trained["words"]
    script = next(place for place, word in enumerate(words) if word.endswith("run_stage.sh"))
    named, config, _, *flags = words[script + 1 :]
    assert named == stage
    nodes, ranks = int(trained["set"]["NNODES"]), int(trained["set"]["NPROC"])
    argv = ("--config", str(EXAMPLES.parent / config), *flags, "--max-minutes", trained["set"]["MAX_MINUTES"])
    return Run(recipe, stage, argv, nodes * ranks, ranks)


def steps_of_job(recipe: str, stage: str, home: Path) -> list[dict[str, Any]]:
    """What a job's script has ``srun`` start, in the order of their first nodes, the trainer's last."""
    text = (EXAMPLES / recipe / "stage.sbatch").read_text(encoding="utf-8")
    (nodes,) = re.findall(r"^#SBATCH --nodes=(\d+)$", text, re.MULTILINE)
    queue = (EXAMPLES / recipe / "all.sh").read_text(encoding="utf-8")
    if stage == "sft" and (own := re.search(r"nodes=(\d+)\n    fi", queue)):
        nodes = own[1]
    log = home / f"srun-{recipe}-{stage}.jsonl"
    log.unlink(missing_ok=True)
    work = home / "checkout"
    work.mkdir(exist_ok=True)
    if not (work / "examples").exists():
        (work / "examples").symlink_to(EXAMPLES)
    job = subprocess.run(
        [bash(), str(EXAMPLES / recipe / "stage.sbatch"), stage],
        cwd=work, env=slurm(home, nodes=int(nodes)) | {"SRUN_LOG": str(log)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return sorted(steps, key=lambda step: any(word.endswith("run_stage.sh") for word in step["words"]))


def slurm(home: Path, *, nodes: int) -> dict[str, str]:
    """An environment in which ``srun`` and ``scontrol`` are stand-ins."""
    folder = home / "bin"
    folder.mkdir(exist_ok=True)
    for name, text in (("srun", _FAKE_SRUN), ("scontrol", _FAKE_SCONTROL)):
        if not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[0-9]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SCONTROL_LOG": str(home / "scontrol.log"),
    }


def bash() -> str:
    """The shell that the scripts name."""
    found = shutil.which("bash")
    assert found is not None
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    """What a YAML file of Kubernetes or SkyPilot holds."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def _of_trainjob(home: Path) -> Run:
    _, job = documents(EXAMPLES / "kubernetes" / "trainjob.yaml")
    trainer = job["spec"]["trainer"]
    words = trainer["args"][0].split()
    script = words.index("examples/launch/run_stage.sh")
    stage, config, _ = words[script + 1 :]
    return Run(
        "kubernetes",
        stage,
        ("--config", _at_home(EXAMPLES.parent / config, home)),
        trainer["numNodes"] * trainer["numProcPerNode"],
        trainer["numProcPerNode"],
    )


def _of_sky(home: Path) -> Run:
    (task,) = documents(EXAMPLES / "skypilot" / "task.yaml")
    stage = task["envs"]["STAGE"]
    config = EXAMPLES / "skypilot" / f"{stage}.yaml"
    gpus = int(task["resources"]["accelerators"].partition(":")[2])
    return Run("skypilot", stage, ("--config", _at_home(config, home)), task["num_nodes"] * gpus, gpus)


def _at_home(config: Path, home: Path) -> str:
    """A copy whose folders of data, which stand at the root of a pod, are those of ``home``."""
    text = config.read_text(encoding="utf-8")
    copy = home / f"{config.parent.name}-{config.name}"
    copy.write_text(re.sub(r"/(?:mnt/prism/)?data/", f"{home}/data/", text), encoding="utf-8")
    return str(copy)
