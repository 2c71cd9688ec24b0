"""The manifests of Kubernetes and SkyPilot are of the form that these take, and say what a run that goes on needs.

Blind spot: the clusters themselves. Forms are those of ``manifests.py``; no controller has seen a file.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.examples.manifests import RUNTIME, SKY_TASK, TRAIN_JOB, complaints
from tests.unit.examples.recipes import EXAMPLES, bash, documents

TRAIN_JOB_FILE = EXAMPLES / "kubernetes" / "trainjob.yaml"
SKY_FILE = EXAMPLES / "skypilot" / "task.yaml"


@pytest.fixture
def runtime() -> dict[str, Any]:
    return documents(TRAIN_JOB_FILE)[0]


@pytest.fixture
def job() -> dict[str, Any]:
    return documents(TRAIN_JOB_FILE)[1]


def test_manifests_have_the_form_that_is_taken(runtime: dict[str, Any], job: dict[str, Any]) -> None:
    """Claim: no key is unknown or missing, and each value has its type, in Trainer's objects and SkyPilot's."""
    assert len(documents(TRAIN_JOB_FILE)) == 2
    assert complaints(runtime, RUNTIME) == []
    assert complaints(job, TRAIN_JOB) == []
    assert [complaints(task, SKY_TASK) for task in documents(SKY_FILE)] == [[]]


def test_the_forms_refuse(job: dict[str, Any]) -> None:
    """Claim: a key that there is not, one that is missing, and a value of another type are named with their place."""
    job["spec"]["trainer"] |= {"numProcPerNode": "4", "nodes": 2}
    del job["spec"]["runtimeRef"]["name"]
    assert sorted(complaints(job, TRAIN_JOB)) == [
        ".spec.runtimeRef.name: is missing",
        ".spec.trainer.nodes: there is no such key",
        ".spec.trainer.numProcPerNode: '4' is no int",
    ]


def test_a_pod_that_ends_early_is_made_anew(runtime: dict[str, Any], job: dict[str, Any]) -> None:
    """Claim: any status but 0 of one pod restarts all of them (none alone), with time to save between the signals."""
    template = runtime["spec"]["template"]["spec"]
    (node,) = template["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert template["failurePolicy"]["maxRestarts"] > 0 and node["template"]["spec"]["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 900
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert runtime["spec"]["mlPolicy"]["numNodes"] == job["spec"]["trainer"]["numNodes"]


def test_a_pods_command_is_the_script_that_hears_signals(job: dict[str, Any], tmp_path: Path) -> None:
    """Claim: with the variables that Trainer sets, the pod's first process is run_stage.sh, which knows its place."""
    script = tmp_path / "examples" / "launch" / "run_stage.sh"
    script.parent.mkdir(parents=True)
    script.write_text(
        '#!/bin/bash\necho "$$ $NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $NPROC $*"\n', encoding="utf-8"
    )
    script.chmod(0o755)
    trainer = job["spec"]["trainer"]
    given = {
        "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "prism-align-node-0-0.prism-align",
        "PET_MASTER_PORT": "29400", "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]), "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    pod = subprocess.Popen(
        [bash(), *trainer["command"][1:], *trainer["args"]], cwd=tmp_path, env=given, stdout=subprocess.PIPE, text=True
    )
    said, _ = pod.communicate(timeout=60)
    assert said.split() == [
        str(pod.pid), "2", "1", "prism-align-node-0-0.prism-align", "29400", "4",
        "align", "examples/kubernetes/align.yaml", "/mnt/prism/runs/align",
    ]  # fmt: skip


def test_what_outlives_a_pod_is_on_the_shared_volume(runtime: dict[str, Any], job: dict[str, Any]) -> None:
    """Claim: the run's folder, its models and its data lie below the mount of the claim, not in the container."""
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    (mount,) = (one["mountPath"] for one in pod["containers"][0]["volumeMounts"] if one["name"] in claims)
    config = (EXAMPLES / "kubernetes" / "align.yaml").read_text(encoding="utf-8")
    for name in ("runs/sft", "runs/warm_start", "data/records"):
        assert f"{mount}/{name}" in config
    assert job["spec"]["trainer"]["args"][0].split()[-1].startswith(f"{mount}/")


def test_skypilot_starts_every_node_in_its_place(tmp_path: Path) -> None:
    """Claim: with SkyPilot's variables a node starts its part, and status 3, of a run that goes on, always recovers."""
    (task,) = documents(SKY_FILE)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [3]
    script = tmp_path / "examples" / "launch" / "run_stage.sh"
    script.parent.mkdir(parents=True)
    script.write_text('#!/bin/bash\necho "$NNODES $NODE_RANK $MASTER_ADDR $NPROC $*"; exit 3\n', encoding="utf-8")
    script.chmod(0o755)
    given = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": "/usr/bin:/bin", **task["envs"],
    }  # fmt: skip
    ran = subprocess.run(
        [bash(), "-c", task["run"]], cwd=tmp_path, env=given, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 3, ran.stderr
    assert ran.stdout.split() == ["2", "1", "10.0.0.1", "8", "sft", "examples/skypilot/sft.yaml", "/runs/sft"]
    assert "/runs" in task["volumes"]
